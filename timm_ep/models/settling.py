"""How a model settles, and how strongly it is coupled: what one measures of it, and the limit that one may set."""

from typing import Any

import torch
from torch import Tensor

from timm_ep.core.coupling import coupling_norms, feedback_shares
from timm_ep.core.equilibrium import no_autocast, prepared
from timm_ep.core.free_phase import free_phase, free_residuals
from timm_ep.models.layers import scale_parameter

__all__ = ["MeasuresSettling"]


class MeasuresSettling:
    """Methods of an `EpVgg`."""

    @torch.no_grad()
    def layer_residuals(self: Any, x: Tensor) -> Tensor:
        """‖Δs_l‖/‖s_l‖ of every layer in each free sweep, (sweeps, layers); no sweeps where the net does not settle."""
        return free_residuals(self._net_for(x), x, self.settings)

    def free_residual(self: Any, x: Tensor) -> list[float]:
        """The largest of `layer_residuals` in each free sweep: how well the net settles on these images."""
        return self.layer_residuals(x).amax(1).tolist()

    @torch.no_grad()
    def feedback_shares(self: Any, x: Tensor) -> list[float]:
        """‖s_l* − s_l,ff‖ / ‖s_l*‖ of every layer: how far feedback moves the states from the feedforward pass."""
        net, x = prepared(self._net_for(x), x)
        if not self.settings.settles:
            return [0.0] * len(net.couplings)
        with no_autocast(x.device.type):
            return feedback_shares(net, x, free_phase(net, x, self.settings, states_only=True).states)

    def couplings(self: Any, size: tuple[int, int]) -> list[float]:
        """√λ‖P_l W_l‖ of every layer for images of this height and width, see `timm_ep.core.coupling`."""
        return coupling_norms(self.net(size), size, self.settings.feedback)

    def cap_couplings(self: Any, limit: float, size: tuple[int, int]) -> None:
        """Scale the kernels of layers above the first down until their couplings are at most `limit`.

        Those of which nothing learns, neither weights nor gains, stay.

        To be called after an optimizer's step, every now and then: a strongly coupled net is not to train itself out of
        the range where it settles. Below ½ that is certain for linear pooling (`timm_ep.core.coupling`).

        Raises:
            ValueError: a limit that is not positive.
        """
        if not limit > 0:
            raise ValueError(f"limit={limit} would leave no kernel; a coupling is capped at a positive number.")
        kernels = [(layer, layer.size_name) for layer in self.layers]
        if self._output_settles:
            kernels.append((self.head.fc, "weight"))
        for (module, name), coupling in list(zip(kernels, self.couplings(size), strict=True))[1:]:
            learns = any(value.requires_grad for part, value in module.named_parameters() if "bias" not in part)
            if coupling > limit and learns:
                scale_parameter(module, name, limit / coupling)
