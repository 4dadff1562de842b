"""The kernels that a net of each preset starts from; how it settles is in `timm_ep.core.settings.PRESETS`.

**The literature's units.** Published CIFAR nets (Laborieux et al. 2021, and most after them) let states settle by
s = clip(x/2, 0, 1) with kernels at PyTorch's default, of standard deviation 1/√(3 · fan-in). Here s = clip(x, 0, 1).
A published net with kernels W, biases b, nudging strength β and learning rate η is, state for state, the net here with

    W' = W/2,   b' = b/2,   β' = β/2,   η' = η/4,

as its energy is twice the one here: ‖s‖² − ⟨s, W ⋆ s⟩ = 2 [½‖s‖² − ⟨s, (W/2) ⋆ s⟩], the nudge and the gradient follow,
and a step of η on W is one of η/4 on W/2. So the published point, in these units, is 0.289 = ½ · 3^(−½) for the
standard deviation of a kernel times √fan-in, β = 0.5 for the cross-entropy (0.25 for the squared error), and learning
rates of 0.0625 … 0.0125 from the first layer to the read-out, whose own parameters stay as they are where it is outside
the dynamics (weight, bias and learning rate). Rain's code (Scellier et al. 2023) is written in these units.
"""

from typing import NamedTuple

__all__ = ["KERNELS", "Kernels"]


class Kernels(NamedTuple):
    """The kernels of a new net.

    Attributes:
        gain: standard deviation of a kernel's entries, times √fan-in.
        pooled_gain: the same for a layer whose map is pooled, by the kind of pooling.
        normalise: whether they are weight-standardised, see `timm_ep.models.layers.EpConv2d`.
        unit: size of a layer's states over that of the layer below, as they are at the start: biases and the read-out
            are in units of unit^l.
    """

    gain: float
    pooled_gain: dict[str, float]
    normalise: bool = True
    unit: float = 1.0


_PUBLISHED = 0.5 * 3**-0.5

KERNELS = {
    # A clipped state keeps about a third of its pre-activation's variance, and average pooling a quarter to a half of
    # it: these gains bring the pre-activations back to a standard deviation of about 0.5, inside the range of the
    # states, in every layer.
    "fast": Kernels(1.8, {"avg": 3.0, "max": 3.0}),
    # The published kernels, in the proportions of `fast`. States fall from layer to layer by the factor between
    # the two.
    "strong": Kernels(_PUBLISHED, {"avg": _PUBLISHED * 3.0 / 1.8, "max": _PUBLISHED}, unit=_PUBLISHED / 1.8),
    "classic": Kernels(_PUBLISHED, {"avg": _PUBLISHED, "max": _PUBLISHED}, normalise=False),
}
