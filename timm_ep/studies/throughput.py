"""The throughput that settling reaches, as a share of that of its convolutions by themselves."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from timm_ep.core.convolution import convolutions_only
from timm_ep.core.energy import Net
from timm_ep.core.equilibrium import equilibrium, prepared
from timm_ep.core.settings import Settings
from timm_ep.models import EpVgg
from timm_ep.studies.measure import Quartiles, Step
from timm_ep.studies.products import Product, multiply_adds, plain_step, recorded_products

__all__ = ["Share", "Throughput"]


@dataclass(frozen=True)
class Share:
    """The throughput of one phase in one precision.

    Attributes:
        phase: `free`, or `step`: free phase, nudged phase and contrast.
        dtype: `float32` or `bfloat16`.
        products: number of them.
        multiply_adds: of all products.
        settling: seconds of the phase.
        plain: seconds of the same products by torch's functions alone.
        share: plain over settling, of the medians.
    """

    phase: str
    dtype: str
    products: int
    multiply_adds: int
    settling: Quartiles
    plain: Quartiles
    share: float


class Throughput:
    """Steps to be timed in turn, and the shares from their times.

    The settling alone: no kernels to make from the parameters and no read-out, but a random force on the last layer.
    The plain step computes all as convolutions, also what settles as a product of matrices.

    Args:
        model: by whose settings it settles.
        images: (B, in_chans, H, W).

    Attributes:
        steps: `free float32`, `step float32` and so on, and each again as `plain …`: the same products by themselves.
    """

    def __init__(self, model: EpVgg, images: Tensor) -> None:
        self.steps: dict[str, Step] = {}
        settings = replace(model.settings, gradient="ep")
        self._products: dict[str, Counter[Product]] = {}
        for dtype in ("float32", "bfloat16"):
            names = [f"{phase} {dtype}" for phase in ("free", "step")]
            self.steps |= zip(names, _phases(*_leaves(model, images, getattr(torch, dtype)), settings), strict=True)
            with convolutions_only():
                as_convolutions = _phases(*_leaves(model, images, getattr(torch, dtype)), settings)
            self._products |= zip(names, map(recorded_products, as_convolutions), strict=True)
        for name, products in self._products.items():
            self.steps[f"plain {name}"] = plain_step(products, str(images.device))

    def shares(self, seconds: Mapping[str, Quartiles]) -> list[Share]:
        """From the times of the steps."""
        rows = []
        for name, products in self._products.items():
            phase, dtype = name.split()
            settling, plain = seconds[name], seconds[f"plain {name}"]
            share = plain.median / settling.median
            rows.append(Share(phase, dtype, products.total(), multiply_adds(products), settling, plain, share))
        return rows


def _leaves(model: EpVgg, images: Tensor, dtype: torch.dtype) -> tuple[Net, Tensor]:
    """Net and images as they settle, cut off from the parameters."""
    net = model.net((images.shape[-2], images.shape[-1]))
    kernels, biases = (tuple(t.detach().to(dtype) for t in tensors) for tensors in (net.kernels, net.biases))
    net, x = prepared(Net(net.couplings, kernels, biases), images.to(dtype))
    kernels, biases = (tuple(t.clone().requires_grad_() for t in tensors) for tensors in (net.kernels, net.biases))
    return net._replace(kernels=kernels, biases=biases), x


def _phases(net: Net, x: Tensor, settings: Settings) -> tuple[Step, Step]:
    """The free phase; and a step, with the nudged phase and the contrast."""

    @torch.no_grad()
    def free() -> tuple[Tensor, ...]:
        return equilibrium(net, x, settings)

    force = torch.randn_like(free()[-1])

    def step() -> None:
        states = equilibrium(net, x, settings)
        torch.autograd.grad(states[-1], [*net.kernels, *net.biases], force)

    return free, step
