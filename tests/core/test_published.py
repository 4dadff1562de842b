"""The classic preset at the literature's working point: a net in published units, written plainly, beside it."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from timm_ep import EpVgg

STEPS, NUDGED_STEPS, BETA = 40, 12, 1.0
TOLERANCE = {"atol": 1e-10, "rtol": 0}


class Published(nn.Module):
    """Laborieux et al. 2021 as published: Φ = Σ_l ⟨s_l, P(W_l ⋆ s_(l−1) + b_l)⟩ and s ← clip(½ ∂Φ/∂s, 0, 1).

    PyTorch's own convolutions at their default init; max pooling after each; a softmax read-out outside the dynamics.
    """

    def __init__(self, channels: list[int], paddings: list[int]) -> None:
        super().__init__()
        pairs = zip([3, *channels[:-1]], channels, paddings, strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(below, above, 3, padding=padding) for below, above, padding in pairs)
        self.fc = nn.Linear(channels[-1], 5)

    def phi(self, states: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(self.convs, states[:-1], states[1:], strict=True)
        return sum((F.max_pool2d(conv(below), 2) * above).sum() for conv, below, above in pairs)

    def loss(self, states: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.fc(states[-1].mean((2, 3))), y, reduction="sum")

    def settle(self, states: list[torch.Tensor], y: torch.Tensor, steps: int, beta: float = 0.0) -> list[torch.Tensor]:
        for _ in range(steps):
            free = [state.detach().requires_grad_() for state in states[1:]]
            states = [states[0], *free]
            grads = torch.autograd.grad(self.phi(states) - beta * self.loss(states, y), free)
            states = [states[0], *((grad / 2).clamp(0, 1) for grad in grads)]
        return [state.detach() for state in states]

    def estimate(self, x: torch.Tensor, y: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Free states, and (1/2β) [∂Φ/∂θ(−β) − ∂Φ/∂θ(β)] / batch for weight and bias of every convolution."""
        zeros, below = [x], x
        for conv in self.convs:
            below = torch.zeros_like(F.max_pool2d(conv(below), 2))
            zeros.append(below.detach())
        free = self.settle(zeros, y, STEPS)
        plus, minus = (self.settle(free, y, NUDGED_STEPS, beta) for beta in (BETA, -BETA))
        parameters = [p for conv in self.convs for p in (conv.weight, conv.bias)]
        grads = torch.autograd.grad((self.phi(minus) - self.phi(plus)) / (2 * BETA * len(x)), parameters)
        return free[1:], list(grads)


@pytest.mark.parametrize(("paddings", "size"), [([1, 1, 1, 1], 16), ([1, 1, 1, 0], 32)])
def test_the_classic_preset_is_the_published_net(paddings, size):
    """W/2, b/2 and β/2 give the same states; the gradient with respect to W/2 is twice that with respect to W."""
    torch.manual_seed(1)
    channels = [6, 8, 8, 10]
    published = Published(channels, paddings).double()
    architecture = [item for width in channels for item in (width, "M")]
    model = EpVgg(
        tuple(architecture),
        num_classes=5,
        preset="classic",
        padding=paddings,
        free_sweeps=STEPS,
        nudged_sweeps=NUDGED_STEPS,
        dtype=torch.float64,
    )
    assert model.beta == BETA / 2
    with torch.no_grad():
        for conv, layer in zip(published.convs, model.layers, strict=True):
            layer.weight.copy_(conv.weight / 2)
            layer.bias.copy_(conv.bias / 2)
        model.head.fc.load_state_dict(published.fc.state_dict())
    x, y = 0.5 * torch.randn(3, 3, size, size, dtype=torch.float64), torch.arange(3)
    states, gradients = published.estimate(x, y)
    loss, free = model.live_loss(x, lambda states: F.cross_entropy(model.output(states), y))
    loss.backward()
    for ours, theirs in zip(free, states, strict=True):
        assert theirs.abs().max() > 1e-3
        assert_close(ours, theirs, **TOLERANCE)
    ours = [p.grad for layer in model.layers for p in (layer.weight, layer.bias)]
    for gradient, theirs in zip(ours, gradients, strict=True):
        assert gradient.abs().max() > 0
        assert_close(gradient, 2 * theirs, **TOLERANCE)


def test_a_new_classic_net_has_half_of_pytorchs_default_kernels():
    """Plain kernels and biases, uniform as `nn.Conv2d` draws them, halved; no gains."""
    model = timm.create_model("ep_vgg5_050", preset="classic")
    for layer in model.layers:
        assert dict(layer.named_parameters()).keys() == {"weight", "bias"}
        bound = 0.5 * layer.weight[0].numel() ** -0.5
        for values in (layer.weight, layer.bias):
            assert 0.9 * bound < values.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert torch.equal(layer()[0], layer.weight)
