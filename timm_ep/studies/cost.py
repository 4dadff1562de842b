"""What a training step costs in memory and time, by EP and by BPTT, as the net settles for longer."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from timm_ep.base.figures import new_figure, save_figure
from timm_ep.studies.measure import in_fresh_process
from timm_ep.studies.workload import Workload, make_training_step

__all__ = ["Cost", "SweepCost"]


@dataclass(frozen=True)
class SweepCost:
    """A training step's cost.

    Attributes:
        gradient: `backprop`, `ep` or `bptt`.
        sweeps: T, of the free phase, and of the nudged phase of EP; 0 for backprop, which does not settle.
        megabytes: peak memory beyond what the process held before its first step, in 10⁶ bytes.
        seconds: of a step after the first, forward and backward, the fastest of three.
    """

    gradient: str
    sweeps: int
    megabytes: float
    seconds: float


@dataclass
class Cost(Workload):
    """Measure a training step of EP and of BPTT for several numbers T of sweeps, each in a process of its own.

    BPTT settles for T sweeps and goes back through all T. EP is given as many nudged sweeps, which is more than it is
    run with, so that both do the same number of them. The backprop step of the feedforward twin stands beside them.

    Args:
        sweeps: the values of T.
        plot: a picture to draw (png, svg, pdf).
        json: print JSON and nothing else.
    """

    model: str = field()  # to be named
    batch_size: int = 32
    sweeps: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32, 64])
    plot: Path | None = None
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sweeps or min(self.sweeps) < 1:
            raise ValueError(f"sweeps={self.sweeps} must be one or more numbers of at least 1, as in [8,16,32].")

    def run(self) -> list[SweepCost]:
        """Print and return the costs: that of backprop, then those of EP and BPTT for every T."""
        if not self.json:
            print(f"{self.model}, batches of {self.batch_size}: one training step")
        costs = []
        for gradient, sweeps in [("backprop", 0), *((name, T) for T in self.sweeps for name in ("ep", "bptt"))]:
            costs.append(self._measure(gradient, sweeps))
            if not self.json:
                cost = costs[-1]
                print(f"T={sweeps:4d} {gradient:8}: {cost.megabytes:8.1f} MB {cost.seconds:8.3f} s", flush=True)
        if self.json:
            print(json.dumps([asdict(cost) for cost in costs], indent=2))
        if self.plot is not None:
            draw_costs(costs, self.model, self.plot)
        return costs

    def _measure(self, gradient: str, sweeps: int) -> SweepCost:
        settings = {"gradient": gradient, "free_sweeps": sweeps, "nudged_sweeps": max(sweeps, 1), "tol": 0.0}
        cost = in_fresh_process(make_training_step, self.workload, settings, device=self.device)
        return SweepCost(gradient, sweeps, cost.megabytes, cost.seconds)


def draw_costs(costs: Sequence[SweepCost], title: str, output: Path) -> None:
    """Memory and time of a training step over the number of sweeps, EP beside BPTT.

    Args:
        costs: of both gradients, and of backprop, which has no sweeps and is drawn as a line.
        title: the model's name.
        output: the picture; its suffix chooses the format.
    """
    figure, (axes,) = new_figure(2)
    for gradient, label in {"ep": "EP", "bptt": "BPTT"}.items():
        rows = [cost for cost in costs if cost.gradient == gradient]
        sweeps = [row.sweeps for row in rows]
        axes[0].plot(sweeps, [row.megabytes for row in rows], ".-", label=label)
        axes[1].plot(sweeps, [row.seconds for row in rows], ".-", label=label)
    for row in (cost for cost in costs if cost.gradient == "backprop"):
        for axis, value in zip(axes, (row.megabytes, row.seconds), strict=True):
            axis.axhline(value, color="0.5", lw=0.8, label="backprop, feedforward twin")
    for axis, quantity in zip(axes, ("peak memory of a training step, MB", "time of a training step, s"), strict=True):
        axis.set(xlabel="T: free sweeps, and nudged ones", ylabel=quantity, xscale="log", yscale="log")
        axis.set_xticks(sweeps, [str(value) for value in sweeps])
        axis.set_xticks([], minor=True)
        axis.legend()
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, output)
