"""What an update by EP takes of an analog device that settles by itself: what is done, times what each costs.

Assumed: every multiply-add of a coupling has a synapse of its own, read in both directions (feedback is its transpose),
and the copies of a shared weight are written one by one; a layer follows its neighbours within a time τ, so that
layers one after the other take N τ a sweep (`sweep`), two halves 2 τ (`odd-even`), all at once τ (`synchronous`);
synapses draw their power for as long as the net settles, and nothing else draws any; images settle one after the other;
the states of a phase are all read at once, as the update of a synapse needs both of its neurons in both phases, and so
are weights written. With S free and M nudged sweeps of c τ each, a feedforward pass of N τ before them (none from
`zero`), K nudged phases, n_w synapses, n_s states and B images:

    time   = B · [(N + c S + K c M) τ + (1 + K) t_read] + t_write
    energy = B · [(N + c S + K c M) τ · n_w p + (1 + K) n_s e_read] + n_w e_write
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from timm_ep.core.free_phase import feedforward_pass
from timm_ep.models import EpVgg
from timm_ep.studies.workload import Workload

__all__ = ["Analog", "AnalogUpdate", "analog_update"]

# What a sweep takes, over τ: N where layers are visited one after the other.
_TAUS = {"odd-even": 2, "synchronous": 1}

_COSTS = ("tau", "synapse_power", "read_time", "read_energy", "write_time", "write_energy")


@dataclass(frozen=True)
class AnalogUpdate:
    """What an update counts. Times are over τ.

    Attributes:
        layers: N.
        nudged_phases: K.
        free_taus: of the free phase, the feedforward pass included, for an image.
        nudged_taus: of the nudged phases together, for an image.
        states: n_s, of an image.
        states_read: (1 + K) n_s, for an image.
        weights: parameters of the couplings, biases included.
        synapses: n_w, with the copies of each weight.
    """

    layers: int
    nudged_phases: int
    free_taus: int
    nudged_taus: int
    states: int
    states_read: int
    weights: int
    synapses: int

    def seconds(self, images: int, tau: float, read_time: float, write_time: float) -> float:
        """The time of an update in seconds, by the formula above."""
        settling = (self.free_taus + self.nudged_taus) * tau
        return images * (settling + (1 + self.nudged_phases) * read_time) + write_time

    def joules(self, images: int, tau: float, power: float, read_energy: float, write_energy: float) -> float:
        """The energy of an update in joules, by the formula above."""
        settling = (self.free_taus + self.nudged_taus) * tau * self.synapses * power
        return images * (settling + self.states_read * read_energy) + self.synapses * write_energy


@torch.no_grad()
def analog_update(model: EpVgg, size: int) -> AnalogUpdate:
    """Count what an update of the model by its settings takes, with images of `size` × `size` pixels.

    With `tol` the sweeps are those that it would take at most.
    """
    net, settings = model.net((size, size)), model.settings
    depth = len(net.couplings)
    image = torch.zeros(1, model.in_chans, size, size, dtype=net.kernels[0].dtype, device=net.kernels[0].device)
    states = [state.numel() for state in feedforward_pass(net, image).states]  # of the same shapes as settled ones
    synapses = sum(
        # Max pooling chooses among four maps of products; the average is in the kernel.
        count * (4 if coupling.max_pool else 1) * kernel[0].numel()
        for count, kernel, coupling in zip(states, net.kernels, net.couplings, strict=True)
    )
    sweep = _TAUS.get(settings.update, depth)
    nudged_phases = 2 if settings.nudging == "centered" else 1
    return AnalogUpdate(
        layers=depth,
        nudged_phases=nudged_phases,
        free_taus=(depth if settings.start == "feedforward" else 0) + settings.free_sweeps * sweep,
        nudged_taus=nudged_phases * settings.nudged_sweeps * sweep,
        states=sum(states),
        states_read=(1 + nudged_phases) * sum(states),
        weights=sum(tensor.numel() for tensor in (*net.kernels, *net.biases)),
        synapses=synapses,
    )


@dataclass
class Analog(Workload):
    """Count what an update by EP takes of an analog device: phases, states read, weights written; and its time and
    energy, from what each costs on the device in mind.

    Args:
        tau: time in which a layer follows its neighbours, in seconds. This and all that follows must be given
            together; without them only the counts are printed.
        synapse_power: drawn by a synapse while the net settles, in watts.
        read_time: of all states of a phase at once, in seconds.
        read_energy: of a state, in joules.
        write_time: of all weights at once, in seconds.
        write_energy: of a weight, in joules.
        json: print JSON and nothing else.

    Raises:
        ValueError: some of the costs without the others, or negative ones.
    """

    model: str = field()  # to be named
    tau: float | None = None
    synapse_power: float | None = None
    read_time: float | None = None
    read_energy: float | None = None
    write_time: float | None = None
    write_energy: float | None = None
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        costs = {name: getattr(self, name) for name in _COSTS}
        missing = [name for name, value in costs.items() if value is None]
        if 0 < len(missing) < len(costs):
            raise ValueError(f"Of the costs of a device {', '.join(missing)} are missing; give all of them, or none.")
        if any(value is not None and value < 0 for value in costs.values()):
            raise ValueError(f"The costs of a device must not be negative; got {costs}.")

    def run(self) -> AnalogUpdate:
        """Print the counts, time and energy, and return the counts."""
        model, images, _ = self.make()
        size = images.shape[-1]
        update = analog_update(model, size)
        facts: dict[str, Any] = {**asdict(update), "images": self.batch_size}
        if self.tau is not None:
            costs = [getattr(self, name) for name in _COSTS]
            tau, power, read_time, read_energy, write_time, write_energy = costs
            facts["seconds"] = update.seconds(self.batch_size, tau, read_time, write_time)
            facts["joules"] = update.joules(self.batch_size, tau, power, read_energy, write_energy)
        if self.json:
            print(json.dumps(facts, indent=2))
        else:
            print(f"{self.model} at {size} × {size}:")
            print("\n".join(f"{name.replace('_', ' '):15s} {value:,}" for name, value in facts.items()))
        return update
