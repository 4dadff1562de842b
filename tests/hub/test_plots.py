import pytest
from PIL import Image

from timm_ep.hub.curves import Plot
from timm_ep.training.trainer import Trainer


def test_curves_of_all_runs_in_a_folder(tmp_path):
    for gradient in ("ep", "backprop"):
        Trainer(epochs=1, train_images=64, gradient=gradient, output=tmp_path / "runs" / gradient, quiet=True).run()
    Plot(tmp_path / "runs", tmp_path / "curves.svg").run()
    text = (tmp_path / "curves.svg").read_text()
    assert text.rstrip().endswith("</svg>")
    with Image.open(Plot(tmp_path / "runs" / "ep", tmp_path / "one.png").run()) as image:
        assert image.width == 1000


def test_layers_of_all_runs_in_a_folder(tmp_path, monkeypatch):
    """What is drawn is what was logged: nudge by layer, and the worst change by sweep."""
    for name in ("one", "two"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        nudges = [(epoch, layer, 0.1 ** (3 - layer) / epoch) for epoch in (1, 2) for layer in (1, 2, 3)]
        text = "".join(f"{epoch},{layer},{nudge}\n" for epoch, layer, nudge in nudges)
        (folder / "layers.csv").write_text("epoch,layer,scaled_nudge\n" + text)
        (folder / "settling.csv").write_text(
            "epoch,phase,sweep,layer,residual\n2,free,1,1,0.5\n2,free,1,2,0.7\n2,free,2,1,0.1\n2,nudged,1,1,9\n"
        )
    drawn = []
    monkeypatch.setattr("timm_ep.hub.curves.save_figure", lambda figure, output: drawn.append(figure))
    Plot(tmp_path / "runs", tmp_path / "layers.png", kind="layers").run()
    left, right = drawn[0].axes
    assert [line.get_ydata().tolist() for line in left.lines[:2]] == [
        pytest.approx([0.01, 0.1, 1.0]),
        pytest.approx([0.005, 0.05, 0.5]),
    ]
    assert [line.get_ydata().tolist() for line in right.lines[:2]] == [[], [0.7, 0.1]]
    assert len(left.lines) == 4


@pytest.mark.parametrize("kind", ["curves", "layers"])
def test_a_folder_without_runs_is_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        Plot(tmp_path, kind=kind).run()
