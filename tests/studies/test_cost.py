import json

import pytest

from timm_ep import cli
from timm_ep.studies.cost import Cost


@pytest.mark.slow
def test_bptt_stores_the_sweeps_and_ep_does_not(tmp_path, capsys):
    """Each in a process of its own."""
    options = ["--sweeps", "[40]", "--batch-size", "16", "--json", "true", "--plot", str(tmp_path / "cost.svg")]
    cli.main(["cost", "ep_vgg5_025", *options])
    backprop, ep, bptt = json.loads(capsys.readouterr().out)
    assert (ep["gradient"], bptt["gradient"], ep["sweeps"], bptt["sweeps"]) == ("ep", "bptt", 40, 40)
    # 40 sweeps of 16 samples with 15,360 states of 4 bytes are 39 MB in states alone.
    assert bptt["megabytes"] > ep["megabytes"] + 39
    assert (backprop["gradient"], backprop["sweeps"]) == ("backprop", 0)
    assert min(backprop["megabytes"], ep["megabytes"]) > 0
    assert min(backprop["seconds"], ep["seconds"], bptt["seconds"]) > 0
    assert (tmp_path / "cost.svg").read_text().rstrip().endswith("</svg>")


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="sweeps=\\[\\] must be one or more"):
        Cost("ep_vgg5_025", sweeps=[])
    with pytest.raises(ValueError, match="batch_size=0"):
        Cost("ep_vgg5_025", batch_size=0)
    with pytest.raises(ValueError, match="test_resnet is no ep_vgg"):
        Cost("test_resnet")
