"""`timm-ep export`: files that answer as the model does, without this package."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from torch.testing import assert_close

from runs import changed_config, make_run
from timm_ep import cli
from timm_ep.hub import graphs
from timm_ep.hub.graphs import export_onnx

CLEAN = """
import sys, numpy, torch
images = torch.from_numpy(numpy.load(sys.argv[2]))
if sys.argv[1].endswith(".pt2"):
    logits = torch.export.load(sys.argv[1]).module()(images).detach().numpy()
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1])
    logits, = session.run(["logits"], {"images": images.numpy()})
assert not any(name.startswith(("timm", "timm_ep")) for name in sys.modules)
numpy.save(sys.argv[3], logits)
"""


def answers(file, images, tmp_path):
    """What a process without this package and without timm makes of the images."""
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "images.npy", images.numpy())
    words = [str(file), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-c", CLEAN, *words], check=True, cwd=tmp_path)
    return torch.from_numpy(numpy.load(tmp_path / "logits.npy"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), [("ep_vgg5_025.ep_digits", "pt2"), ("ep_vgg16_025.ep_cifar10", "onnx")])
def test_a_released_model_answers_alike_elsewhere(tmp_path, capsys, name, format):
    pytest.importorskip("onnxruntime")
    file = tmp_path / f"model.{format}"
    cli.main(["export", name, "--format", format, "--output", str(file)])
    assert "largest difference of a logit" in capsys.readouterr().out
    model = timm.create_model(name, pretrained=True).eval()
    images = torch.randn(7, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert_close(answers(file, images, tmp_path), model(images), rtol=1e-4, atol=1e-4)


def test_a_run_and_its_twin(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    images = torch.randn(3, 1, 48, 48)
    settled = torch.export.load(graphs.Export(str(run), "pt2", img_size=48).run()).module()
    twin = torch.export.load(
        graphs.Export(str(run), "pt2", tmp_path / "twin.pt2", sweeps=0, img_size=48).run()
    ).module()
    assert (tmp_path / f"{tmp_path.name}.pt2").exists()
    with torch.no_grad():
        assert_close(settled(images), model(images), rtol=1e-4, atol=1e-5)
        model.gradient = "backprop"
        assert_close(twin(images), model(images), rtol=1e-4, atol=1e-5)
    assert (settled(images) - twin(images)).abs().max() > 1e-3


def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch, capsys):
    for words, message in (
        (["nothing"], "model 'nothing' is unknown to timm"),
        (["ep_vgg5_025.ep_digits", "--format=coreml"], "coreml"),
        (["ep_vgg5_025.ep_digits", "--sweeps=-1"], "free_sweeps=-1 is too small"),
        (["ep_vgg5_025.ep_digits", "--img-size=8", f"--output={tmp_path / 'x.onnx'}"], "8×8 pixels are too small"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["export", *words])
        assert message in capsys.readouterr().err
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["export", "ep_vgg5_025.ep_digits", f"--output={tmp_path / 'x.onnx'}"])
    assert "pip install timm_ep[export]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_onnx_of_short_products_is_refused(tmp_path):
    model = timm.create_model("ep_vgg5_025", products="bfloat16", num_classes=2).eval()
    with pytest.raises(ValueError, match="products='bfloat16': onnxruntime has no transposed convolution"):
        export_onnx(model, torch.rand(2, 3, 32, 32), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_net_of_short_products_that_settles_until_it_rests(tmp_path):
    """It is written in full precision and with the number of sweeps that is given."""
    run = make_run(tmp_path / "run")
    args = json.loads((run / "config.json").read_text())["model_args"]
    args |= {"products": "bfloat16", "tol": 0.01, "nudging": "one-sided"}
    (run / "config.json").write_bytes(changed_config(run, model_args=args))
    with pytest.raises(ValueError, match=r"tol=0\.01 stops the sweeps"):
        graphs.Export(str(run), "pt2", tmp_path / "x.pt2").run()
    path = graphs.Export(str(run), "pt2", tmp_path / "x.pt2", sweeps=3).run()
    model = timm.create_model(f"local-dir:{run}", pretrained=True, products="full", tol=0, free_sweeps=3).eval()
    images = torch.randn(5, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert_close(torch.export.load(path).module()(images), model(images), rtol=1e-4, atol=1e-5)


def test_what_comes_out_otherwise_is_not_written(tmp_path, monkeypatch):
    run, file = make_run(tmp_path / "run"), tmp_path / "x.pt2"
    file.write_text("an earlier export")
    monkeypatch.setattr(graphs, "export_program", lambda *_: lambda images: torch.full((len(images), 4), 9.0))
    with pytest.raises(ValueError, match=r"gives other logits, by up to .*; nothing is written"):
        graphs.Export(str(run), "pt2", file).run()
    assert file.read_text() == "an earlier export"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "x.pt2"}
