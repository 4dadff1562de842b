"""What an analog device does in an update: counted by hand for a net that is small enough."""

import json

import pytest
from torch.testing import assert_close

from runs import make_run
from timm_ep import EpVgg, cli
from timm_ep.studies.analog import Analog, analog_update

# On 8 × 8 pixels: 4 channels at 4 × 4 after pooling, then 6 at 4 × 4.
NET = (4, "M", 6)
STATES = [4 * 4 * 4, 6 * 4 * 4]


@pytest.mark.parametrize(("pool", "taps"), [("avg", [3 * 4 * 4, 4 * 3 * 3]), ("max", [4 * 3 * 3 * 3, 4 * 3 * 3])])
def test_counts(pool, taps):
    """Average pooling is in a kernel of 4 × 4; max pooling looks at four products of 3 × 3."""
    model = EpVgg(NET, num_classes=5, free_sweeps=6, nudged_sweeps=1, pool=pool, nudging="centered")
    update = analog_update(model, 8)
    assert (update.states, update.states_read) == (sum(STATES), 3 * sum(STATES))
    assert update.synapses == sum(count * one for count, one in zip(STATES, taps, strict=True))
    assert (update.free_taus, update.nudged_taus) == (2 + 6 * 2, 2 * 2)


def test_a_device_that_moves_all_at_once():
    model = EpVgg(
        NET, num_classes=5, free_sweeps=50, nudged_sweeps=20, update="synchronous", start="zero", readout="state"
    )
    update = analog_update(model, 8)
    assert (update.layers, update.nudged_phases, update.free_taus, update.nudged_taus) == (3, 1, 50, 20)
    assert update.states == sum(STATES) + 5
    assert update.synapses == STATES[0] * 48 + STATES[1] * 36 + 5 * STATES[1]


def test_a_run_is_counted_by_the_settings_that_are_asked_for(tmp_path):
    """By the checks that every study of a run has: of a run only settings can be changed."""
    make_run(tmp_path / "run")
    one, other = (Analog(str(tmp_path / "run"), model_args={"free_sweeps": sweeps}).run() for sweeps in (4, 10))
    assert other.free_taus - one.free_taus == 6 * one.layers
    with pytest.raises(ValueError, match=r"'in_chans'.* of a run are fixed"):
        Analog(str(tmp_path / "run"), model_args={"in_chans": 1}).run()
    with pytest.raises(ValueError, match="is no ep_vgg"):
        Analog("resnet18")


def test_time_and_energy_by_the_command(capsys):
    costs = {"tau": 2.0, "synapse-power": 3.0, "read-time": 5.0, "read-energy": 7.0, "write-time": 11.0}
    options = [word for name, value in costs.items() for word in (f"--{name}", str(value))]
    cli.main(["analog", "ep_vgg5_025", "--batch-size", "10", "--json", *options, "--write-energy", "13"])
    facts = json.loads(capsys.readouterr().out)
    taus, synapses, read = facts["free_taus"] + facts["nudged_taus"], facts["synapses"], facts["states_read"]
    assert taus == 4 + 6 * 4 + 4
    assert_close(facts["seconds"], 10 * (taus * 2 + 2 * 5) + 11.0)
    assert_close(facts["joules"], 10 * (taus * 2 * synapses * 3 + read * 7) + synapses * 13.0)
    with pytest.raises(SystemExit):
        cli.main(["analog", "ep_vgg5_025", *options])
    assert "write_energy are missing" in capsys.readouterr().err
    cli.main(["analog", "ep_vgg5_025"])
    assert "states read" in capsys.readouterr().out
