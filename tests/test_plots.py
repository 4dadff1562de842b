import pytest
from PIL import Image

from timm_ep.plots import Plot
from timm_ep.trainer import Trainer


def test_curves_of_all_runs_in_a_folder(tmp_path):
    for gradient in ("ep", "backprop"):
        Trainer(epochs=1, train_images=64, gradient=gradient, output=tmp_path / "runs" / gradient, quiet=True).run()
    Plot(tmp_path / "runs", tmp_path / "curves.svg").run()
    text = (tmp_path / "curves.svg").read_text()
    assert text.rstrip().endswith("</svg>")
    with Image.open(Plot(tmp_path / "runs" / "ep", tmp_path / "one.png").run()) as image:
        assert image.width == 1000


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        Plot(tmp_path).run()
