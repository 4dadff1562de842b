"""Model cards: valid metadata, escaped text, facts as measured, no drift; the weights that ship with the package."""

import copy
import json
import math
import os
import re
import shlex
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from runs import SETTINGS, changed_config, make_facts, make_run
from timm_ep import Settings, cli
from timm_ep.hub.cards import Card, RunFacts, folder_card
from timm_ep.hub.export import prepare
from timm_ep.hub.redaction import redacted, without_folder, without_folders
from timm_ep.training.evaluate import Validate

ROOT = Path(__file__).parents[2]
RELEASES = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))
SECRET = "hf_RecognisableFakeToken0123456789"


def twin_facts(**kwargs) -> RunFacts:
    settings = {**make_facts().settings, "gradient": "backprop"}
    return make_facts(settings=settings, feedback_share=None, top1=64.25, command="the twin's command", **kwargs)


@pytest.fixture
def folder(tmp_path):
    """A repository with a twin."""
    run = make_run(tmp_path / "run", top5=93.0, teacher="resnet18.a1_in1k", signals={"local_error": 0.3})
    twin = tmp_path / "twin"
    twin.mkdir()
    twin_facts().save(twin / "results.json")
    prepare(run, tmp_path / "folder", "alice/ep_vgg5_025.insects", twin=twin)
    return tmp_path / "folder"


def test_metadata_are_what_the_hub_reads(folder):
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert data.library_name == "timm"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert "transformers" not in data.tags  # a default of timm's that would be wrong
    assert {"timm", "timm_ep", "equilibrium-propagation", "image-classification"} <= set(data.tags)
    assert data.model_name == "ep_vgg5_025.insects"
    results = [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_split) for r in data.eval_results]
    assert results == [("accuracy", 61.5, "uoft-cs/cifar10", "test"), ("accuracy", 93.0, "uoft-cs/cifar10", "test")]


def test_the_card_tells_how_it_was_trained_and_how_the_twin_fared(folder):
    text = (folder / "README.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.M))
    assert rows["Feedback gain λ"] == "0.37"
    assert rows["Nudging strength β"] == "0.002, centered"
    assert rows["Sweeps"] == "7 free, 1 nudged; sweep updates, feedforward start"
    assert rows["Intermediate error signals"] == r"local\_error (weight 0.3)".replace("(", r"\(").replace(")", r"\)")
    assert rows["Teacher"] == r"resnet18.a1\_in1k"
    assert rows["Seed"] == "3"
    assert rows["Time"] == "12 s"
    assert rows["Epochs"] == "2"
    assert rows["this model"] == "61.50 % | 93.00 % | 12 s"
    assert rows["backprop twin"] == "64.25 % | – | 12 s"
    assert make_facts().machine.replace("_", r"\_") in text
    assert f"torch {torch.__version__}".replace("_", r"\_") in text
    assert "```\ntimm-ep train --dataset torch/cifar10\n```" in text
    assert "```\nthe twin's command\n```" in text
    assert "arXiv:2508.15989" in text
    assert "import timm_ep" in text
    assert "Unknown model (ep_vgg5_025)" in text
    for heading in (
        "Classify",
        "Features",
        "Fine-tune by Equilibrium",
        "Distil",
        "Limits",
        "Citation",
        "Results against",
    ):
        assert re.search(rf"^##+ {heading}", text, re.M)


def test_without_a_twin_or_facts_the_card_says_so(tmp_path):
    run = make_run(tmp_path / "run")
    prepare(run, tmp_path / "alone", "alice/x")
    assert "| backprop twin | not run |" in (tmp_path / "alone" / "README.md").read_text()
    (run / "results.json").unlink()
    prepare(run, tmp_path / "bare", "alice/x")
    text = (tmp_path / "bare" / "README.md").read_text()
    assert "was not recorded" in text
    assert "| Feedback gain λ | 0.37 |" in text
    assert "model-index" not in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "timm"


def test_a_reference_by_backprop_is_not_called_ep(tmp_path):
    run = make_run(tmp_path / "run")
    twin_facts().save(run / "results.json")
    assert "but **not** by Equilibrium" in folder_card(run, "x", "hf-hub:a/x")


def test_sweeps_that_a_tolerance_ends_are_said_to_be_at_most_so_many(tmp_path):
    run = make_run(tmp_path / "run")
    make_facts(settings={**make_facts().settings, "free_sweeps": 40, "tol": 0.02}).save(run / "results.json")
    sweeps = re.search(r"^\| Sweeps \| (.+) \|$", folder_card(run, "x", "hf-hub:a/x"), re.M)
    assert sweeps is not None
    assert sweeps[1].startswith("at most 40 free")
    assert "until no layer changes by more than 0.02 of its size; sweep updates" in sweeps[1]


def test_all_settings_are_published(tmp_path):
    """Of a run that relies on defaults too: it is to be the same model after a default has changed."""
    run = make_run(tmp_path / "run")
    (run / "config.json").write_bytes(changed_config(run, model_args={"in_chans": 1, "feedback": 0.37}))
    prepare(run, tmp_path / "folder", "alice/x")
    args = json.loads((tmp_path / "folder" / "config.json").read_text())["model_args"]
    expected = asdict(timm.create_model("ep_vgg5_025", feedback=0.37).settings)
    assert {name: args[name] for name in expected} == expected


def test_curves_without_matplotlib_get_a_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install timm_ep\[plots\]"):
        prepare(make_run(tmp_path / "run"), tmp_path / "folder", "alice/x")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("wrong", [make_facts(), twin_facts(dataset="digits"), twin_facts(architecture="ep_vgg9")])
def test_a_twin_is_the_same_net_on_the_same_data(tmp_path, wrong):
    run = make_run(tmp_path / "run")
    (tmp_path / "twin").mkdir()
    wrong.save(tmp_path / "twin" / "results.json")
    with pytest.raises(ValueError, match="expected ep_vgg5_025 on torch/cifar10 by backprop"):
        prepare(run, tmp_path / "folder", "alice/x", twin=tmp_path / "twin")
    assert not (tmp_path / "folder").exists()


def test_a_dataset_known_by_another_name_gets_its_id(tmp_path):
    run = make_run(tmp_path / "run", dataset="folder")
    prepare(run, tmp_path / "a", "alice/x", dataset_id="uoft-cs/cifar10")
    prepare(tmp_path / "a", tmp_path / "b", "alice/x")  # it is remembered
    for name in "ab":
        assert ModelCard.load(tmp_path / name / "README.md").data.datasets == ["uoft-cs/cifar10"]
        assert "CIFAR-10, a copy as image files, 100 training" in (tmp_path / name / "README.md").read_text()


def test_an_output_that_settles_is_shown_at_work(tmp_path):
    """It is a probability as it is, and learns by the squared error; a teacher by its logits it is not."""
    cards = {}
    for readout in ("head", "state"):
        run = make_run(tmp_path / readout)
        args = {"in_chans": 1, "readout": readout}
        (run / "config.json").write_bytes(changed_config(run, model_args=args))
        cards[readout] = folder_card(run, "x", "hf-hub:alice/x")
    assert [len(re.findall("softmax|cross_entropy|### Distil", card)) for card in cards.values()] == [5, 0]
    (tune,) = [block for block in re.findall(r"```python\n(.*?)```", cards["state"], re.S) if "AdamW" in block]
    exec(tune.replace('"hf-hub:alice/x", pretrained=True', '"ep_vgg5_025", in_chans=1, readout="state"'), {})


EVIL = "<script>alert(1)</script>`](javascript:alert(1))\n---\n# {{ 7 * 7 }} | <img src=x onerror=alert(1)> \x1b[31m"


def test_what_a_run_says_is_text_in_its_card(tmp_path):
    """HTML, Markdown, YAML, Jinja and terminal sequences, in every field that holds text."""
    run = make_run(tmp_path / "run")
    settings = dict.fromkeys(make_facts().settings, EVIL)
    texts = dict.fromkeys(
        ("dataset", "teacher", "started_from", "machine", "torch_version", "timm_version", "timm_ep_version"), EVIL
    )
    facts = make_facts(**texts, command=f"```\n{EVIL}", signals={EVIL: 1.0}, settings=settings, dataset_id=EVIL)
    facts.save(run / "results.json")
    facts.save(run / "twin.json")
    cfg = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    harmless = "<script>alert(1)</script>"
    (run / "config.json").write_bytes(changed_config(run, pretrained_cfg={**cfg, "license": harmless}))
    text = folder_card(run, "x", "hf-hub:alice/x")
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    metadata = ModelCard(text).data
    assert metadata.library_name == "timm"
    assert metadata.license == "other"
    assert metadata.datasets is None
    assert {result.metric_value for result in metadata.eval_results} == {61.5}
    fences = re.findall(r"^(`{3,})\n(.*)\n\1$", body, re.M)
    assert len(fences) == 2  # the commands, of one line each, in fences longer than any in them
    for fence, command in fences:
        assert fence not in command
        body = body.replace(command, "")
    for part in (front, body):
        assert "<" not in part
        assert "\x1b" not in part
    assert "7 \\* 7" in body
    assert not re.search(r"(?<!\\)\]\(javascript", body)
    headings = ["x", "Usage", "How it was trained", "Results against the backprop twin", "Limits", "Citation"]
    assert re.findall(r"^##? (.*)", body, re.M) == headings


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "1", None, True])
def test_facts_are_finite_numbers(tmp_path, value):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**asdict(make_facts()), "train_seconds": value}))
    with pytest.raises(ValueError, match=r"train_seconds is|is not JSON"):
        RunFacts.load(path)


def test_facts_with_defaults_may_be_missing(tmp_path):
    """Results written before a field was added stay readable."""
    values = asdict(make_facts())
    del values["dataset_id"], values["signals"]
    (tmp_path / "results.json").write_text(json.dumps(values))
    assert RunFacts.load(tmp_path / "results.json").signals == {}
    del values["seed"]
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"missing fields \['seed'\]"):
        RunFacts.load(tmp_path / "results.json")


def test_secrets_are_redacted(monkeypatch, tmp_path):
    for text in (SECRET, "api_org_abcdefghijklmnopqrstuvwxyz", "hf_oauth_eyJhbGciOi.J9-x_y.z", f"--token={SECRET}"):
        assert redacted(f"before {text} after").replace("--token=", "") == "before *** after"
    assert redacted("https://me:pass@host/x") == "https://***@host/x"
    for harmless in (
        "hf_flowers102classification",
        "hf_hub_download",
        "uoft-cs/cifar10",
        "runs/hf_models",
        "a@b.org",
        "https://host/a@b",
    ):
        assert redacted(harmless) == harmless
    monkeypatch.setenv("HF_TOKEN", "of-no-known-form")
    assert redacted("x of-no-known-form") == "x ***"
    for placeholder in ("test", "0", " ", "of-no-known-form "):  # the last as a file with a newline gives it
        monkeypatch.setenv("HF_TOKEN", placeholder)
        facts = make_facts(command="with of-no-known-form")
        facts.save(tmp_path / "placeholder.json")
        shown = "with ***" if "known" in placeholder else "with of-no-known-form"
        assert RunFacts.load(tmp_path / "placeholder.json") == replace(facts, command=shown)
    monkeypatch.setenv("HF_TOKEN", "of-no-known-form")
    facts = make_facts(command=f"timm-ep train --token {SECRET} of-no-known-form")
    facts.save(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["command"] == "timm-ep train --token *** ***"
    run = make_run(tmp_path / "run")
    cfg = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    (run / "config.json").write_bytes(changed_config(run, pretrained_cfg={**cfg, "license": SECRET}))
    assert "license: ***" in folder_card(run, "x", "hf-hub:alice/x")


def test_the_command_line_strikes_tokens_out_of_errors(tmp_path, capsys):
    """Of what came by a file of options too, which is not looked through."""
    (tmp_path / "options.yaml").write_text(f"run_folder: {SECRET}\n")
    with pytest.raises(SystemExit):
        cli.main(["validate", "--config", str(tmp_path / "options.yaml")])
    told = capsys.readouterr().err
    assert "*** does not exist; expected the folder of a run" in told
    assert SECRET not in told


# Releases


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_released_cards_have_not_drifted(release, capsys):
    cli.main(["card", str(release), "--check"])
    assert "is up to date" in capsys.readouterr().out


def test_drift_fails_the_check(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="has drifted"):
        Card(run, check=True).run()
    Card(run).run()
    Card(run, check=True).run()
    make_facts(seed=4).save(run / "results.json")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["card", str(run), "--check"])
    assert stopped.value.code == 2
    assert f"write it again with: timm-ep card {run}" in capsys.readouterr().err


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_release_is_the_model_its_card_describes(release):
    """By name, offline: weights, settings, data, classes and, where the package has the images, the accuracy."""
    facts = RunFacts.load(release / "results.json")
    assert release.name in timm.list_pretrained("ep_*")
    model = timm.create_model(release.name, pretrained=True).eval()
    folder = timm.create_model(f"local-dir:{release}", pretrained=True).eval()
    for name, tensor in folder.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    # What came to be a setting later is off; shorter products, which many CPUs do not have, saved time in training.
    recorded = {**asdict(Settings()), **facts.settings, "products": "full"}
    assert asdict(model.settings) == asdict(folder.settings) == recorded
    for key in ("mean", "std", "input_size", "num_classes", "label_names"):
        assert list_of(model.pretrained_cfg[key]) == list_of(folder.pretrained_cfg[key])
    if facts.dataset == "digits":
        assert Validate(release).run().top1 == pytest.approx(facts.top1)
    assert not set(re.findall(r"/(?:home|tmp|root|work)/\S*", (release / "results.json").read_text()))


def list_of(value):
    return list(value) if isinstance(value, list | tuple) else value


def test_releases_leave_the_architectures_defaults_alone():
    model = timm.create_model("ep_vgg5_025")
    assert (model.num_classes, model.in_chans) == (1000, 3)


def test_releases_are_tuned_by_ep():
    model = timm.create_model("ep_vgg5_025.ep_digits", pretrained=True, num_classes=3, **SETTINGS)
    start = copy.deepcopy(model.state_dict())
    torch.nn.functional.cross_entropy(model(torch.randn(2, 1, 32, 32)), torch.tensor([0, 2])).backward()
    assert torch.equal(
        start["layers.0.weight"], timm.create_model("ep_vgg5_025.ep_digits", pretrained=True).layers[0].weight
    )
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in model.parameters())


@pytest.mark.slow
def test_an_installed_wheel_has_the_weights_and_the_template(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import timm, timm_ep, sys; from pathlib import Path; from timm_ep.hub.cards import Card;"
        f"assert timm_ep.__file__.startswith({str(tmp_path)!r}), timm_ep.__file__;"
        "print(timm.create_model('ep_vgg5_025.ep_digits', pretrained=True).num_classes, timm.list_pretrained('ep_*'));"
        f"Card(Path({str(make_run(tmp_path / 'run'))!r})).run()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 ['ep_vgg5_025.ep_digits'")


@pytest.mark.slow
def test_without_the_import_timm_says_what_the_card_explains(tmp_path):
    code = f"import timm; timm.create_model('local-dir:{make_run(tmp_path / 'run')}')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RuntimeError: Unknown model (ep_vgg5_025)" in done.stderr


def test_folders_of_a_machine_are_not_published(tmp_path):
    command = (
        "timm-ep train --output=/home/al/secret/run '--data-dir=/home/al/two words/scans' --initial-checkpoint=runs/a "
        """'--teacher=["/mnt/t/one", "hf-hub:al/two", "local-dir:/mnt/t/three"]' --dataset=torch/cifar10 """
        '\'--distill-args={"file": "~/x/y.pt"}\' --origin=https://host/a/b --at=/data ../up/c'
    )
    assert shlex.split(without_folders(command)) == [
        "timm-ep",
        "train",
        "--output=run",
        "--data-dir=scans",
        "--initial-checkpoint=runs/a",
        '--teacher=["one", "hf-hub:al/two", "local-dir:three"]',
        "--dataset=torch/cifar10",
        '--distill-args={"file": "y.pt"}',
        "--origin=https://host/a/b",
        "--at=/data",
        "../up/c",
    ]
    for value, shown in (
        ("/home/al smith/secret/start", "start"),
        ("hfds//home/al/x/data", "hfds/data"),
        ("/home/o'brien/secret/x", "x"),
        ("/home/al/[x]/y", "y"),
        ("file:///home/al/x", "x"),
        ("{'checkpoint': '/home/al/w.pth'}", "{'checkpoint': 'w.pth'}"),
        ("/home/al//secret/run", "run"),
        ("~al/x, resnet18, /mnt/a/b", "~al/x, resnet18, b"),
        ("runs/[x]/y/z", "runs/[x]/y/z"),
        ("hf-hub:al/two", "hf-hub:al/two"),
    ):
        assert without_folder(value) == shown
    given = {"command": command, "teacher": "/mnt/t/one", "started_from": "/home/al/secret/start"}
    run = make_run(tmp_path / "run", **given, dataset="hfds//mnt/data")
    prepare(run, tmp_path / "folder", "alice/ep_vgg5_025.insects")
    facts = RunFacts.load(tmp_path / "folder" / "results.json")
    assert facts.command == without_folders(command)
    assert (facts.teacher, facts.started_from, facts.dataset) == ("one", "start", "hfds/data")
    for text in (tmp_path / "folder" / "README.md", tmp_path / "folder" / "results.json"):
        assert not re.search("secret|/mnt|two words", text.read_text())


def test_the_published_log_is_of_the_epochs_of_the_facts(tmp_path):
    """Not of those that a resumed run was on its way to."""
    run = make_run(tmp_path / "run")
    with (run / "summary.csv").open("a") as file:
        file.write("3,1.0,70\n")
    prepare(run, tmp_path / "folder", "alice/ep_vgg5_025.insects")
    assert (tmp_path / "folder" / "summary.csv").read_text().splitlines()[1:] == ["1,1.5,40", "2,1.2,60"]


def test_the_card_of_what_is_published_keeps_its_name(folder):
    before = (folder / "README.md").read_text()
    Card(folder, check=True).run()
    Card(folder).run()
    assert (folder / "README.md").read_text() == before


def test_limits_are_those_of_the_net(tmp_path):
    """At λ = 1 nothing is said of weak feedback, and where sweeps end by themselves nothing of a fixed number."""
    texts = []
    for settings in ({"feedback": 0.02, "tol": 0.0}, {"feedback": 1.0, "tol": 0.02}):
        run = make_run(tmp_path / str(settings["tol"]), settings={**make_facts().settings, **settings})
        texts.append(folder_card(run, "x", "hf-hub:alice/x"))
    for text, weak in zip(texts, (True, False), strict=True):
        assert ("A low feedback gain" in text) == ("after a fixed number of sweeps" in text) == weak
        assert ("ends after at most" in text) != weak
