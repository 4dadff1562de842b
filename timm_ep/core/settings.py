"""The settings of a net: how it settles and how its gradient is taken; and the presets, sets of defaults."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

__all__ = ["PHYSICAL", "PRESETS", "SETTING_NAMES", "Gradient", "HasSettings", "Settings"]

Gradient = Literal["ep", "bptt", "backprop", "local"]
"""How the gradient is taken, see `Settings`."""

# What makes a device of a net: off at 0.
PHYSICAL = (
    "state_noise",
    "relative_state_noise",
    "drive_noise",
    "relative_drive_noise",
    "state_bits",
    "weight_bits",
    "feedback_mismatch",
)


@dataclass(frozen=True)
class Settings:
    """How a net settles and how its gradient is taken. Every field is a constructor argument and attribute of a model.

    Attributes:
        feedback: λ ≥ 0, the gain of the feedback. Weak feedback keeps deep nets well inside the range where they
            settle; 1 is the literature's net; 0 is the feedforward net, where EP is backpropagation.
        free_sweeps: updates of every layer in the free phase, at most. From the feedforward start two (down, then up)
            account for feedback to first order in λ, and every further pair for one order more. Six give every layer of
            nearly all nets that were measured (`scripts/README.md`) a gradient cosine of 0.99 to the exact one, of the
            others 0.98. Accuracy changes little from two on.
        nudged_sweeps: updates of every layer in the nudged phase, at most. The first carries the nudge from the last
            layer to the first, two more (up, then down) add the first order in λ. In the other orders of `update` a
            nudge moves by one layer (`synchronous`) or two (`odd-even`) a sweep; a warning says where it does not
            reach every layer that learns.
        beta: β ≠ 0, the nudging strength, relative to the largest |∂L/∂s| of each sample. Small, because the one-sided
            estimate has a bias of order β and the difference form loses nothing at small β: states of deep layers can
            be as small as 1e-4 at init, and a nudge larger than a state runs into its bound. Negative nudges away.
        tol: stop a phase when the largest relative change of a layer, ‖Δs_l‖/‖s_l‖ over the batch (in the nudged phase
            that of its difference from the free state), falls below this in a sweep (in the order `sweep`: an upward
            one, after which both directions have been taken). The worst layer's gradient then has a cosine to the
            exact one of about 1 − 15 tol², so that 0.02 gives 0.99 (`scripts/README.md`). 0 runs all sweeps
            and never waits for the device.
        nudging: `one-sided`: (∂E(β) − ∂E(0))/β. `random-sign`: the same with the sign of β drawn for each batch from
            torch's generator, so that the bias of order β cancels over batches. `centered`: (∂E(β) − ∂E(−β))/2β, twice
            the cost and a bias of order β² (Laborieux et al. 2021).
        forces: `frozen`: ∂L/∂s and the winners of max pooling at the free equilibrium, for the whole nudged phase; all
            that `loss.backward()` can know of a loss, and the same to first order in β. (A winner that changed under a
            nudge would move states by a jump, which over a small β is no gradient any more.) `live`: the literature's;
            ∂L/∂s and winners at the current states in every nudged step, a phase that goes on from wherever the free
            one ended (settled or not), and an absolute β: the energy is E + β Σ L over the batch's samples. That needs
            the loss as a function: `EpVgg.live_loss`, which `timm_ep.signals.task.EpTask` and the trainer take by
            themselves. `loss.backward()` on `model(x)` or `model.equilibrium(x)` works with live forces too, but cannot
            recompute them: it takes them as frozen, and β as relative (winners still move). Live forces need λ near
            1: they integrate what the free phase left unsettled, in float32 at least 1e-7 of rounding, against a nudge
            of β λ^(N−l); one that rounding would drown is refused.
        update: `sweep`: layer after layer, each from its newest neighbours, the direction alternating. `odd-even`: two
            halves. `synchronous`: all at once, the literature's.
        start: `feedforward`: from the pass without feedback, which is already near the equilibrium when λ is small.
            `zero`: the literature's.
        pool: `avg`: linear, so that every layer update is an exact minimisation of the energy, and cheaper (it is
            folded into the kernel). `max`: the literature's.
        products: `bfloat16` or `float16`: compute in that dtype all products but the feedforward pass: those that λ
            multiplies, those with differences of states, and the contrast. States stay in the dtype of the kernels, and
            so does nearly all of the accuracy, from the feedforward start; the products take a third to a half of the
            time where the device has units for it. `full`: all in the dtype of the kernels. Autocast instead takes
            states and all into the short dtype. For EP with frozen forces: `bptt` and `backprop` compute in full.
            The states of a deep net at λ = 1 are too small for float16, which is refused there.
        gradient: `ep`: equilibrium propagation. `bptt`: autograd through the free sweeps, the exact derivative of what
            they compute, and that at the equilibrium where they reach it, at many times the memory. `backprop`: the
            feedforward twin (no feedback at all), trained by backpropagation.
            `local`: the same twin, each layer by the losses on its own state alone: what intermediate error signals do
            without any credit from above (Nøkland & Eidnes, arXiv:1901.06656), to tell what EP adds to them. All but
            `ep` are those of the ideal net, whatever device follows.
        state_noise: standard deviation of what is added to a state at every update, in units of its range. This and
            all that follows make a physical device of the net (`timm_ep.core.device`): the two phases settle
            independently and their states are subtracted, with β the largest push on a pre-activation (of the last
            layer, if no signal pushes another). All 0 or off by default; then none of it runs.
        relative_state_noise: the same over the state.
        drive_noise: the same of pre-activations, before they are clipped.
        relative_drive_noise: the same over the pre-activation.
        noise: `fresh`: new numbers at every update, independent in both phases. `frozen`: the same for every image,
            update and phase: neurons that differ from each other, as they were made.
        state_bits: bits of a state in [0, 1] as it is kept and read; 0 for full precision.
        weight_bits: bits of a kernel between minus and plus its largest entry; 0 for full precision. Gradients
            pass to the parameters as if there were no rounding.
        rounding: `nearest`, or `stochastic`: up or down, the nearer the likelier.
        feedback_mismatch: standard deviation of a feedback weight over the forward weight, fixed: feedback that is not
            the transpose. The energy is then only nearly one.

    Raises:
        TypeError: a value of another type.
        ValueError: a value outside of these, short products with live forces, or a device with either or a tolerance.
    """

    feedback: float = 0.02
    free_sweeps: int = 6
    nudged_sweeps: int = 1
    beta: float = 1e-6
    tol: float = 0.0
    nudging: Literal["one-sided", "centered", "random-sign"] = "one-sided"
    forces: Literal["frozen", "live"] = "frozen"
    update: Literal["sweep", "odd-even", "synchronous"] = "sweep"
    start: Literal["feedforward", "zero"] = "feedforward"
    pool: Literal["avg", "max"] = "avg"
    products: Literal["full", "bfloat16", "float16"] = "full"
    gradient: Gradient = "ep"
    state_noise: float = 0.0
    relative_state_noise: float = 0.0
    drive_noise: float = 0.0
    relative_drive_noise: float = 0.0
    noise: Literal["fresh", "frozen"] = "fresh"
    state_bits: int = 0
    weight_bits: int = 0
    rounding: Literal["nearest", "stochastic"] = "nearest"
    feedback_mismatch: float = 0.0

    def __post_init__(self) -> None:
        for option in fields(self):
            value, choices = getattr(self, option.name), get_args(option.type)
            if choices:
                if value not in choices:
                    raise ValueError(
                        f"{option.name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}."
                    )
            elif isinstance(value, bool) or not isinstance(
                value, int if isinstance(option.default, int) else (int, float)
            ):
                raise TypeError(
                    f"{option.name}={value!r} is a {type(value).__name__}; give a number like {option.default}."
                )
            elif not abs(value) < float("inf"):
                raise ValueError(f"{option.name}={value!r} is not finite; give a number like {option.default}.")
        least_values = {"feedback": 0, "free_sweeps": 0, "nudged_sweeps": 1, "tol": 0, **dict.fromkeys(PHYSICAL, 0)}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; it must be at least {least}.")
        if self.beta == 0:
            raise ValueError(f"beta={self.beta} is no nudge; the nudging strength must not be 0, for example 1e-6.")
        if self.physical and (self.forces == "live" or self.products != "full" or self.tol > 0):
            raise ValueError(
                "A device (noise, bits, feedback_mismatch) settles for a fixed time under frozen forces, in full "
                f"products: got forces={self.forces!r}, products={self.products!r} and tol={self.tol}."
            )
        if self.forces == "live" and self.products != "full":
            raise ValueError(
                f"products={self.products!r} would drown live forces, which need every product to the last bit; use "
                "products='full', or forces='frozen'."
            )

    @property
    def physical(self) -> bool:
        """Whether the net is a device: something disturbs its states or its weights."""
        return any(getattr(self, name) for name in PHYSICAL)

    @property
    def settles(self) -> bool:
        """Whether states settle with feedback, and are not those of the feedforward twin."""
        return self.gradient in ("ep", "bptt")

    @property
    def live(self) -> bool:
        """Whether the gradient is EP with live forces, which need the loss as a function of the states."""
        return self.gradient == "ep" and self.forces == "live"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Settings":
        """The settings of `PRESETS[name]`, with some changed.

        Raises:
            ValueError: an unknown preset, or a value outside its range.
        """
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is unknown; choose one of {', '.join(map(repr, PRESETS))}.")
        return cls(**{**PRESETS[name], **changes})


SETTING_NAMES = tuple(option.name for option in fields(Settings))


class HasSettings:
    """Whoever has `settings`, with each of their fields as an attribute of its own that can be changed."""

    settings: Settings

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTING_NAMES and callable(value):  # a module by that name would be registered, and never be found
            raise TypeError(f"{name} is a setting of the model; give the {type(value).__name__} another name.")
        super().__setattr__(name, value)


def _setting(name: str) -> property:
    def get(owner: HasSettings) -> Any:
        return getattr(owner.settings, name)

    def set_(owner: HasSettings, value: Any) -> None:
        owner.settings = replace(owner.settings, **{name: value})

    return property(get, set_, doc=f"`{name}` of `Settings`.")


for _name in SETTING_NAMES:
    setattr(HasSettings, _name, _setting(_name))


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},  # the defaults
    # The literature's λ, from which `timm_ep.models.presets` draws its kernels, settled by the means of `fast`. States
    # fall from layer to layer, to 1e-13 in the sixteenth: the nudge must be smaller still, and loses nothing by it.
    # Sweeps are as many as the net asks for.
    "strong": {"feedback": 1.0, "beta": 1e-18, "free_sweeps": 40, "nudged_sweeps": 20, "tol": 0.005},
    # What the literature runs on CIFAR-10 with a softmax read-out (Laborieux et al. 2021), β in the units of this
    # package: half of the published one (`timm_ep.models.presets`).
    "classic": {
        "feedback": 1.0,
        "free_sweeps": 250,
        "nudged_sweeps": 25,
        "beta": 0.5,
        "nudging": "centered",
        "forces": "live",
        "update": "synchronous",
        "start": "zero",
        "pool": "max",
    },
}
