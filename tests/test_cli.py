"""The command line: options, files, errors, and a newcomer's path from a folder of images to predictions."""

import csv
import json
import subprocess
import sys

import pytest
import yaml

from timm_ep import cli
from timm_ep.data.datasets import open_data
from timm_ep.hub.cards import RunFacts
from timm_ep.training.evaluate import Validate
from timm_ep.training.trainer import Trainer

TINY = ['--model-args={"architecture": [8, "M", 8, "M", 8, "M", 8, "M"]}', "--batch-size=16", "--quiet"]


def test_the_command_line_takes_yaml_overrides_and_hyphens(tmp_path, capsys):
    config = {"epochs": 9, "train_images": 64, "model": "ep_vgg5_025", "model_args": {"free_sweeps": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", tmp_path / "recipe.yaml", "--epochs", 1, "--batch-size=32", "--output", tmp_path / "run"]
    cli.main(["train", *map(str, options), "--quiet", "true"])
    facts = RunFacts.load(tmp_path / "run" / "results.json")
    assert (facts.epochs, facts.n_train, facts.settings["free_sweeps"]) == (1, 64, 2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"accuracy: {facts.top1:.2f} % (ep_vgg5_025, ")
    cli.main(["validate", str(tmp_path / "run")])
    cli.main(["predict", str(tmp_path / "run"), "--top", "1", "--sweeps", "0"])
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "--dataset", "nothing"], 2, "timm-ep train: error: dataset='nothing' is unknown"),
        (["train", "--epochs", "many"], 2, "epochs"),
        (["train", "--rate", "1"], 2, "rate"),
        (["fly"], 2, "unknown command 'fly'"),
        (["validate", "nowhere"], 2, "nowhere does not exist; expected the folder of a run"),
        (["validate"], 2, "run_folder"),
        (["predict"], 2, "run_folder"),
        (["gradcheck"], 2, "model"),
        (["train", "--device=gpu"], 2, "device='gpu' is unknown to PyTorch"),
        (["train", "--smoothing=1"], 2, "smoothing=1 leaves nothing of the labels"),
    ],
)
def test_user_errors_exit_with_2_and_a_message(words, code, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == code
    assert message in capsys.readouterr().err


def test_module_and_help():
    done = subprocess.run(
        [sys.executable, "-m", "timm_ep", "train", "--help"], capture_output=True, text=True, check=True
    )
    assert "peak learning rate" in done.stdout
    done = subprocess.run([sys.executable, "-m", "timm_ep"], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == [*cli.COMMANDS, "run"]


def test_a_newcomers_path_from_a_folder_of_images_to_predictions(tmp_path, capsys):
    digits = open_data("digits")
    for split, part in (("train", digits.train), ("test", digits.test)):
        for index in range(100):
            image, label = part[index]
            folder = tmp_path / "digits" / split / f"number-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index}.png")
    data, run = ["--dataset=folder", f"--data-dir={tmp_path / 'digits'}"], tmp_path / "run"
    cli.main(["train", *data, *TINY, "--epochs=1", "--val-split=0.1", "--augment=crop", f"--output={run}"])
    accuracy = capsys.readouterr().out.splitlines()[-1]
    assert accuracy.startswith("accuracy: ")

    cli.main(["validate", str(run), f"--data-dir={tmp_path / 'digits'}", f"--output={tmp_path / 'valid.json'}"])
    assert capsys.readouterr().out.splitlines() == [accuracy]
    facts, values = RunFacts.load(run / "results.json"), json.loads((tmp_path / "valid.json").read_text())
    assert (values["top1"], values["n_test"]) == (facts.top1, 100)
    with pytest.raises(SystemExit):
        cli.main(["validate", str(run), "--dataset=digits"])
    assert "knows the classes ['number-0'" in capsys.readouterr().err

    images = tmp_path / "digits" / "test"
    for suffix in ("csv", "json"):
        cli.main(["predict", str(run), f"--images={images}", "--top=2", f"--output={tmp_path / 'out'}.{suffix}"])
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    answers = json.loads((tmp_path / "out.json").read_text())
    assert (len(rows), len(answers)) == (200, 100)
    assert [row["image"] for row in rows[::2]] == [answer["image"] for answer in answers]
    assert [row["class"] for row in rows[:2]] == [each["class"] for each in answers[0]["classes"]]
    assert float(rows[0]["probability"]) == answers[0]["classes"][0]["probability"]
    hits = sum(f"/{answer['classes'][0]['class']}/" in answer["image"] for answer in answers)
    assert hits == pytest.approx(facts.top1, abs=1)
    with pytest.raises(SystemExit):
        cli.main(["predict", str(run), f"--output={tmp_path / 'out.txt'}"])
    assert "ends in .csv or .json" in capsys.readouterr().err


def test_the_saved_options_repeat_the_run(tmp_path, capsys):
    cli.main(["train", *TINY, "--epochs=1", "--train-images=64", "--mixup=0.2", f"--output={tmp_path / 'one'}"])
    saved = tmp_path / "one" / "args.yaml"
    assert yaml.safe_load(saved.read_text())["mixup"] == 0.2
    cli.main(["train", "--config", str(saved), "--output", str(tmp_path / "two"), "--resume"])
    first, second = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(saved)])
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--config", "SAVED"], ["--config=SAVED"]])
def test_options_override_the_file_wherever_it_stands(words, tmp_path, monkeypatch):
    """Else the folder in it would be trained over."""
    chosen = []
    monkeypatch.setattr(Trainer, "run", lambda options: chosen.append(options))
    saved = tmp_path / "args.yaml"
    saved.write_text(yaml.safe_dump({"output": "old", "epochs": 3, "model_args": {"free_sweeps": 6, "beta": 0.5}}))
    words = [word.replace("SAVED", str(saved)) for word in words]
    options = ["--output", "new", "--epochs=1", "--model-args.free_sweeps=2", "--amp", "False", "--quiet", "True"]
    cli.main(["train", *options, *words])
    cli.main(["train", *words, *options])
    for options in chosen:
        assert (str(options.output), options.epochs, options.amp, options.quiet) == ("new", 1, False, True)
        assert options.model_args == {"free_sweeps": 2, "beta": 0.5}


def test_lines_tell_the_progress_where_there_is_no_terminal(tmp_path, capsys):
    cli.main(["train", *TINY[:2], "--epochs=2", "--train-images=64", f"--output={tmp_path}"])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["epoch 1/2", "epoch 2/2"]
    for word in ("loss", "accuracy", "residual", "sweeps", "images/s", "left"):
        assert word in lines[0]
    assert "\r" not in printed.out + printed.err


def test_run_names_what_it_cannot_find(capsys):
    for words, code in ((["run"], 2), (["run", "--help"], 0), (["run", "nowhere.py"], 2)):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == code
    assert "nowhere.py is neither a file nor a module" in capsys.readouterr().err


def test_every_option_has_a_default(monkeypatch):
    started = []
    monkeypatch.setattr(Trainer, "run", lambda command: started.append(command))
    cli.main(["train"])
    assert started == [Trainer()]


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(command):
        raise KeyboardInterrupt

    for kind, words, told in (
        (Trainer, ["train"], "timm-ep train: interrupted; what it had done by then goes on with --resume.\n"),
        (Validate, ["validate", "run"], "timm-ep validate: interrupted.\n"),
    ):
        monkeypatch.setattr(kind, "run", interrupted)
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert (stopped.value.code, capsys.readouterr().err) == (130, told)


def test_a_configuration_in_another_encoding_is_named(tmp_path, capsys):
    (tmp_path / "args.yaml").write_bytes("data_dir: Bücher".encode("latin-1"))
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(tmp_path / "args.yaml")])
    assert "the file of --config is not text in UTF-8" in capsys.readouterr().err
