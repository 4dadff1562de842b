"""Convolutional recurrent nets that settle: the parameters of their couplings, and the model that timm sees."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from timm.layers import ClassifierHead
from timm.models import register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_ep.core.energy import Coupling, Net, fold_average_pool
from timm_ep.core.equilibrium import equilibrium
from timm_ep.core.live import LossOfStates, live_loss
from timm_ep.core.recording import recording
from timm_ep.core.settings import SETTING_NAMES, HasSettings, Settings
from timm_ep.models.architecture import feature_layers, read_architecture
from timm_ep.models.images import check_images
from timm_ep.models.layers import EpConv2d
from timm_ep.models.presets import KERNELS
from timm_ep.models.settling import MeasuresSettling

__all__ = ["EpVgg"]


# To torch.fx, which runs a model on names of tensors, what looks at their values and sizes is one node each.
register_notrace_function(equilibrium)
register_notrace_function(fold_average_pool)


@register_notrace_module
class EpVgg(HasSettings, MeasuresSettling, nn.Module):
    """A VGG whose layer states settle to the equilibrium of an energy, trained by Equilibrium Propagation.

    `loss.backward()` runs EP for any loss on the logits, the features or the states; with `forces="live"`, as in the
    classic preset, `live_loss` is what recomputes the forces, see `Settings`. Every field of `Settings` is an attribute
    that can be changed at any time: `model.gradient = "bptt"`.

    Args:
        architecture: output channels of each convolution, "M" for pooling after it (`read_architecture`). The names
            that timm registers set it; it can be given to them as well, for a net of another shape.
        num_classes: classes of the linear read-out; 0 for none.
        in_chans: channels of the image.
        global_pool: pooling before the read-out: `avg`, `max`, … or `''` for none, as in timm.
        drop_rate: dropout before the read-out.
        init_gain: factor on the initial gain of every kernel, or one for each. Below 1 for nets with strong feedback,
            which settle only while the loop gain, about λ‖W‖², is below 1.
        learn_gain: whether the gains of the kernels learn. With fixed ones a net with strong feedback keeps the loop
            gain it starts with.
        center_kernels: whether the mean is taken from every kernel. It is, so that the sum of the states below, which
            varies much and says little, does not drive a layer; feedforward nets that were trained with it are
            converted with False (`timm_ep.training.convert`).
        normalise_kernels: whether kernels are normalised at all; by default as the preset says. Plain ones (False) have
            no gains, and represent a published net parameter for parameter.
        padding: of every convolution, in pixels, or one for each: the literature's last one has 0.
        unit: size of a layer's states over that of the layer below, in whose powers biases, features and the read-out
            are measured; by default as the preset says. Below 1 for nets at λ = 1 whose small kernels let the states
            fall from layer to layer: biases of order 1 would drown states of 1e-6, and logits of order 1 need weights
            of 1e6. It changes the parameters' units alone, not the nets that they can represent.
        preset: defaults of the settings and of the initial kernels (`timm_ep.core.settings.PRESETS`,
            `timm_ep.models.presets`). `fast`; `strong`: λ = 1, by the same means; `classic`: λ = 1 by the literature's
            algorithm, step by step, from the literature's kernels.
        readout: `head`: the read-out is outside the dynamics, and only its loss nudges. `state`: the output is one more
            state layer, in [0, 1], that settles and feeds back with the others, coupled linearly to the average of the
            last convolution's state; `forward` returns it. It is made for the squared error (`SquaredError` in
            `timm_ep.signals.losses`), whose force pulls it towards the one-hot label. Train it with a small learning
            rate: an output that falls to 0 for all images is held there, out of reach of a small nudge.
        readout_layer: the convolution whose state the read-out outside the dynamics reads, from 1; by default the last.
            `prune_intermediate_layers` sets it.
        device: of the parameters.
        dtype: of the parameters.
        **settings: fields of `timm_ep.core.settings.Settings`, with their reasons there; they override the preset.

    Raises:
        TypeError: an unknown argument.
        ValueError: what is no architecture (`read_architecture`), a setting outside its range, an unknown preset or
            read-out, paddings of another number than the convolutions, no such `readout_layer`, or, for a read-out
            inside the dynamics, dropout, a unit other than 1, a pooling other than `avg` or another layer than the
            last: it is part of the energy.
    """

    def __init__(
        self,
        architecture: tuple[int | str, ...],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        init_gain: float | Sequence[float] = 1.0,
        learn_gain: bool = True,
        center_kernels: bool = True,
        normalise_kernels: bool | None = None,
        padding: int | Sequence[int] = 1,
        unit: float | None = None,
        preset: str = "fast",
        readout: Literal["head", "state"] = "head",
        readout_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if num_classes < 0 or in_chans < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 0, and in_chans={in_chans} at least 1.")
        unknown = settings.keys() - set(SETTING_NAMES)
        if unknown:
            raise TypeError(
                f"EpVgg got unknown arguments {sorted(unknown)}; its settings are {', '.join(SETTING_NAMES)}."
            )
        self.settings = Settings.preset(preset, **settings)
        if readout not in ("head", "state"):
            raise ValueError(f"readout={readout!r} is unknown; choose 'head' or 'state'.")
        self.readout = readout
        kernels = KERNELS[preset]
        normalise = kernels.normalise if normalise_kernels is None else normalise_kernels
        self.unit = kernels.unit if unit is None else unit
        if not 0 < self.unit < float("inf"):
            raise ValueError(f"unit={unit} is no size; give a positive number, 1 where states do not fall with depth.")
        self._check_readout(global_pool, drop_rate)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.center_kernels = center_kernels
        self.grad_checkpointing = False

        convolutions = read_architecture(architecture, in_chans)
        depth = len(convolutions)
        self.pooled = [convolution.pooled for convolution in convolutions]
        self._taps = feature_layers(convolutions)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": convolutions[tap].channels, "reduction": convolutions[tap].reduction, "module": f"layers.{tap}"}
            for tap in self._taps
        ]
        self.padding = (padding,) * depth if isinstance(padding, int | float) else tuple(padding)
        init_gains = (init_gain,) * depth if isinstance(init_gain, int | float) else tuple(init_gain)
        for name, values in {"padding": self.padding, "init_gain": init_gains}.items():
            if len(values) != depth or not all(0 <= value < float("inf") for value in values):
                raise ValueError(f"{name}={values}: give one number of at least 0, or one for each of {depth} layers.")
        if not all(isinstance(value, int) for value in self.padding):
            raise ValueError(f"padding={self.padding}: pixels of padding are whole numbers.")
        layers: list[EpConv2d] = []
        for index, (below, channels, pooled, _) in enumerate(convolutions):
            gain = init_gains[index] * (kernels.pooled_gain[self.settings.pool] if pooled else kernels.gain)
            scale = self.unit ** (index + 1)
            layer = EpConv2d(below, channels, gain, center_kernels, normalise, scale, device=device, dtype=dtype)
            if layer.gain is not None:
                layer.gain.requires_grad_(learn_gain)
            layers.append(layer)
        self.layers = nn.ModuleList(layers)
        if readout_layer is not None and not (1 <= readout_layer <= depth and (readout == "head" or not num_classes)):
            raise ValueError(
                f"readout_layer={readout_layer}: give one of the {depth} convolutions, from 1; with readout='state' it "
                "is the last."
            )
        self._top = (readout_layer or depth) - 1  # layer whose state is the features
        self.num_features = convolutions[self._top].channels
        # Last, because adaptive gradient clipping leaves out the last two parameters.
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype)
        self.head_hidden_size = self.head.num_features
        self._center_output()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One group per layer, for layer-wise learning rates."""
        return {"stem": r"^layers\.0", "blocks": r"^layers\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Settle again in the backward pass instead of storing it: for `bptt` and `backprop`. EP never stores it."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear read-out."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new read-out; `reset_classifier(0, "")` leaves 4-D features.

        A read-out inside the dynamics goes with its feedback: without it, the states settle a little elsewhere.

        Raises:
            ValueError: for a read-out inside the dynamics a pooling other than `avg`, or another layer than the last.
        """
        if num_classes and self.readout == "state" and self._top + 1 < len(self.layers):
            raise ValueError(
                f"readout='state' reads the last of {len(self.layers)} convolutions, and the features of this model "
                f"are those of readout_layer={self._top + 1}: create it with readout='head', or without that."
            )
        kept = self.head.global_pool.pool_type
        self._check_readout((kept if global_pool is None else global_pool) if num_classes else "avg", self.drop_rate)
        self.num_classes = num_classes
        like = self.layers[0].weight
        self.head.reset(num_classes, global_pool, in_features=self.num_features, device=like.device, dtype=like.dtype)
        self._center_output()
        self.head_hidden_size = self.head.num_features

    def _check_readout(self, global_pool: str, drop_rate: float) -> None:
        if self.readout == "state" and (global_pool != "avg" or drop_rate or self.unit != 1):
            raise ValueError(
                f"readout='state' is part of the energy: it needs global_pool='avg', drop_rate=0 and unit=1; got "
                f"global_pool={global_pool!r}, drop_rate={drop_rate} and unit={self.unit:g}."
            )

    def _center_output(self) -> None:
        """Start an output state in the middle of its range: one held at 0 for all images would never learn."""
        if self._output_settles:
            nn.init.constant_(self.head.fc.bias, 0.5)

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm writes beside weights to create the model again: all settings, as they are now, so that it is the
        same model after a default of the package changes."""
        pruned = {} if self._top + 1 == len(self.layers) else {"readout_layer": self._top + 1}
        return {**vars(self).get("_created_with", {}), **asdict(self.settings), **pruned}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._created_with = {name: value for name, value in args.items() if name != "features_only"}  # of the factory

    @property
    def _output_settles(self) -> bool:
        return self.readout == "state" and self.num_classes > 0

    @property
    def learns(self) -> bool:
        """Whether anything inside the dynamics does: where all of it is frozen, nothing has to be nudged."""
        inside = self if self._output_settles else self.layers
        return any(parameter.requires_grad for parameter in inside.parameters())

    def net(self, size: tuple[int, int] | None = None) -> Net:
        """The net as its energy sees it; differentiable with respect to the parameters.

        Args:
            size: height and width of the images; needed for `readout="state"`, whose kernel covers the whole of the
                last convolution's state.
        """
        fold = self.settings.pool == "avg"
        couplings, kernels, biases = [], [], []
        for layer, pooled, padding in zip(self.layers, self.pooled, self.padding, strict=True):
            kernel, bias = layer()
            kernels.append(fold_average_pool(kernel) if pooled and fold else kernel)
            biases.append(bias)
            stride = 2 if pooled and fold else 1
            couplings.append(Coupling(stride, padding, max_pool=pooled and not fold))
        if self._output_settles:
            if size is None:
                raise ValueError("The net of a model with readout='state' depends on the image size; give size=(H, W).")
            height, width = map(self.top_size, size)
            kernel = self.head.fc.weight[:, :, None, None] / (height * width)
            kernels.append(kernel.expand(-1, -1, height, width))
            biases.append(self.head.fc.bias)
            couplings.append(Coupling(padding=0))
        return Net(tuple(couplings), tuple(kernels), tuple(biases))

    def top_size(self, size: int) -> int:
        """Side of the last state for images of this side; 0 or less if there is none, or no state on the way to it."""
        for pooled, padding in zip(self.pooled, self.padding, strict=True):
            size = (size + 2 * padding - 2) // (2 if pooled else 1)
            if size < 1:
                break
        return size

    def equilibrium(self, x: Tensor) -> tuple[Tensor, ...]:
        """The states at the free equilibrium, differentiable by the method of `settings.gradient`.

        Args:
            x: images, (B, in_chans, H, W), floating point, finite.

        Returns:
            s_1…s_N: s_l is (B, out_l, H / r_l, W / r_l) in [0, 1], with r_l = 2^(poolings up to l), rounded down. With
            `readout="state"` also the output, (B, num_classes, 1, 1).

        Raises:
            TypeError: `x` is not a floating-point tensor of the model's dtype (or of any, under autocast).
            ValueError: wrong rank, channels, an empty batch, an image too small for the poolings, or (checked on the
                CPU only, as it would make another device wait) pixels that are not finite.
        """
        return equilibrium(self._net_for(x), x, self.settings, recompute=self.grad_checkpointing)

    def live_loss(
        self, x: Tensor, loss: LossOfStates, parameters: Iterable[Tensor] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A loss whose `backward` is EP with forces recomputed in every nudged step and an absolute β.

            loss, _ = model.live_loss(x, lambda states: F.cross_entropy(model.output(states), y))
            loss.backward()

        Args:
            x: images, as for `equilibrium`.
            loss: of the states s_1…s_N, a scalar, the mean over the batch. It is called in every nudged step.
            parameters: of the loss, beside those of the model's read-out.

        Returns:
            The loss at the free equilibrium, and the free states, which carry no gradient.

        Raises:
            ValueError: `gradient` is not `ep`, the model is a device or has short products, the loss is no scalar, or
                depends on no state; images as for `equilibrium`.
        """
        if self.settings.gradient != "ep":
            raise ValueError(
                f"live_loss is EP, but the model has gradient={self.settings.gradient!r}; take the loss of "
                "model.equilibrium(x) instead."
            )
        settings = replace(self.settings, forces="live")  # raises what live forces cannot do
        own = () if self._output_settles else self.head.parameters()  # inside the dynamics it is a coupling
        unique = {id(parameter): parameter for parameter in (*own, *parameters)}
        return live_loss(self._net_for(x), x, settings, loss, list(unique.values()))

    def _net_for(self, x: Tensor) -> Net:
        """The net for these images, which are checked."""
        check_images(self, x)
        return self.net((x.shape[-2], x.shape[-1]))

    def __prepare_scriptable__(self) -> "EpVgg":
        raise NotImplementedError(
            "TorchScript cannot compile a net that settles. Take torch.export.export, torch.onnx.export (both: timm-ep "
            "export) or torch.jit.trace, in eval mode."
        )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The last state at each resolution, and that which the read-out reads, as `forward_features` gives it.

        Args:
            x: images, (B, in_chans, H, W).
            indices: the last n if an int, all if None, else those listed.
            norm: without effect: there is no final normalisation.
            stop_early: without effect: the layers above feed back.
            output_fmt: `NCHW`.
            intermediates_only: leave out what the read-out reads.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: states are images; only 'NCHW' is supported.")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        states = self.equilibrium(x)
        intermediates = [self._feature(states, self._taps[index]) for index in take]
        return intermediates if intermediates_only else (self._feature(states, self._top), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Prune what the chosen features do not need: the read-out. All that feeds back stays, whatever lies above.

        Without the read-out the highest chosen feature is what `forward_features` gives, and `reset_classifier` reads.
        """
        take, highest = feature_take_indices(len(self.feature_info), indices)
        if prune_head and not self._output_settles:
            self._top = self._taps[highest]
            self.num_features = self.feature_info[highest]["num_chs"]
            self.reset_classifier(0, "")
        return take

    def _feature(self, states: Sequence[Tensor], layer: int) -> Tensor:
        """A state over its unit: features are of order 1, whatever the states are, and the read-out is one of many that
        may be put on them."""
        return states[layer] if self.unit == 1 else states[layer] / self.unit ** (layer + 1)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last convolution's state over its unit, (B, num_features, H / r, W / r)."""
        return self._feature(self.equilibrium(x), self._top)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) from the features; with `pre_logits` the pooled features.

        With `readout="state"` the value at which the output comes to rest above them.
        """
        if pre_logits:
            return self.head(x, pre_logits=True)
        return self.head(x).clamp(0, 1) if self._output_settles else self.head(x)

    def output(self, states: Sequence[Tensor]) -> Tensor:
        """What `forward` returns, from the states of `equilibrium`."""
        return states[-1].flatten(1) if self._output_settles else self.forward_head(self._feature(states, self._top))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes); with `readout="state"` the output state, in [0, 1]."""
        output = self.output(self.equilibrium(x))
        return output.detach() if recording() else output  # a loss on what is exported has no gradient at all
