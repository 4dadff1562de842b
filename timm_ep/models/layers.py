"""The parameters of one coupling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["EpConv2d", "scale_parameter"]


@torch.no_grad()
def scale_parameter(module: nn.Module, name: str, factor: float) -> None:
    """Multiply a parameter by a number, through its parametrization if it has one.

    Raises:
        NotImplementedError: a parametrization that does not say what gives another value.
    """
    if is_parametrized(module, name):
        setattr(module, name, getattr(module, name) * factor)
        return
    # What torch's pruning, and its weight normalisation by hooks, compute the value from.
    sources = dict(module.named_parameters(recurse=False))
    source = next((sources[each] for each in (name, f"{name}_g", f"{name}_orig") if each in sources), None)
    if source is None or hasattr(module, f"{name}_u"):  # the spectral normalisation by hooks takes any scale away
        raise NotImplementedError(f"{name} is not a parameter, and what it is computed from cannot be scaled.")
    source.mul_(factor)


class EpConv2d(nn.Module):
    """The parameters of one coupling: a 3×3 kernel, under scaled weight standardisation or plain, and a bias.

    A standardised kernel is gain · W / (std · √fan-in) per output channel, with the mean taken away first: a function
    of the parameters alone, so EP stays exact, that keeps the size of a kernel, and with it the loop gain, from running
    away in training (Brock et al., arXiv:2101.08692). Batch statistics would couple the samples and break the energy.
    A plain one is W itself, as in the literature of EP.

    Args:
        in_chs: channels of the state below.
        out_chs: channels of the state above.
        gain: initial standard deviation of the kernel's entries, times √fan-in.
        center: take the mean away. Without, the kernel is gain · W / (rms · √fan-in), weight normalisation (Salimans &
            Kingma, arXiv:1602.07868): it keeps its size likewise, and can be any kernel at all.
        normalise: whether the kernel is normalised in one of these ways. A plain kernel has no `gain` (it is None).
        unit: the size that states of this layer are expected to have; the bias in use is `unit` times the parameter,
            so that one learning rate fits the biases of all layers. 1 where states of all layers are of order 1.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        gain: float,
        center: bool = True,
        normalise: bool = True,
        unit: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.initial_gain, self.center, self.unit = gain, center, unit
        self.weight = nn.Parameter(torch.empty(out_chs, in_chs, 3, 3, device=device, dtype=dtype))
        self.gain = nn.Parameter(torch.empty(out_chs, device=device, dtype=dtype)) if normalise else None
        self.bias = nn.Parameter(torch.empty(out_chs, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normalised: Gaussian weights as large as standardised ones, constant gains, zero biases.

        Plain: weights and biases uniform in ±√3 · gain/√fan-in, PyTorch's default where the gain is 1/√3.
        """
        fan_in = self.weight[0].numel()
        if self.gain is None:
            bound = 3**0.5 * self.initial_gain * fan_in**-0.5
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)
        else:
            nn.init.normal_(self.weight, std=fan_in**-0.5)
            nn.init.constant_(self.gain, self.initial_gain)
            nn.init.zeros_(self.bias)

    @property
    def size_name(self) -> str:
        """The parameter that gives the kernel in use its size."""
        return "weight" if self.gain is None else "gain"

    def forward(self) -> tuple[Tensor, Tensor]:
        """The effective kernel, (out, in, 3, 3), and the bias, (out,).

        Neither is a parameter itself, whose memory FSDP frees after this call.
        """
        bias = self.bias * self.unit
        if self.gain is None:
            return self.weight.clone(), bias
        fan_in = self.weight[0].numel()
        # The floor is relative to the variance at the start, 1/fan_in, so that it means the same in every layer.
        normalise = F.layer_norm if self.center else F.rms_norm
        normalised = normalise(self.weight.flatten(1), (fan_in,), eps=1e-6 / fan_in).view_as(self.weight)
        return normalised * (self.gain * fan_in**-0.5)[:, None, None, None], bias
