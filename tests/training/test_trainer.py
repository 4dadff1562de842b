"""End to end: train on digits, save, load through timm, test and classify again; the command line over the same."""

import csv
import errno
import json
import math
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from timm_ep.base.files import replacing
from timm_ep.data.datasets import open_data
from timm_ep.data.pictures import UnreadableImage
from timm_ep.hub import export
from timm_ep.hub.cards import Card, RunFacts
from timm_ep.hub.curves import Plot
from timm_ep.hub.graphs import Export
from timm_ep.studies.gradcheck import Gradcheck
from timm_ep.training.evaluate import Validate, evaluate, load_run
from timm_ep.training.predict import Predict
from timm_ep.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    facts = Trainer(epochs=2, train_images=640, model_args={"feedback": 0.03}, output=folder, quiet=True).run()
    return folder, facts


def test_a_run_learns_and_writes_what_timm_loads(run):
    folder, facts = run
    assert facts.top1 > 40  # chance is 10
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.feedback == 0.03
    assert model.in_chans == 1
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[1]["test_accuracy"]) == facts.top1
    assert 0 < float(rows[1]["residual"]) < 0.1
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "summary.csv",
        "results.json",
        ".lock",
        "args.yaml",
        "layers.csv",
        "settling.csv",
        "curves.png",
        "checkpoints",
    }
    assert RunFacts.load(folder / "results.json") == facts
    assert (facts.settings["feedback"], facts.n_train, facts.n_test) == (0.03, 640, 360)
    assert 0 < facts.feedback_share < 0.5


def test_validation_finds_the_same_accuracy_again(run, capsys):
    folder, facts = run
    assert Validate(folder).run().top1 == facts.top1
    assert capsys.readouterr().out.startswith(f"accuracy: {facts.top1:.2f} % (ep_vgg5_025, ")


def test_prediction_names_classes_of_files_and_folders(run, tmp_path, capsys):
    folder, _ = run
    data = open_data("digits")
    for index in range(3):
        data.test[index][0].save(tmp_path / f"{index}.png")
    from_files = Predict(folder, tmp_path).run()
    assert [len(answer) for answer in from_files] == [3, 3, 3]
    for answer, in_a_batch in zip(from_files, Predict(folder, top=3).run(), strict=False):
        assert [name for name, _ in answer] == [name for name, _ in in_a_batch]
        assert [share for _, share in answer] == pytest.approx([share for _, share in in_a_batch], rel=1e-4)
    for answer in from_files:
        assert {name for name, _ in answer} <= set(data.classes)
        assert 1 >= answer[0][1] >= answer[1][1] >= answer[2][1] > 0
    (alone,) = Predict(folder, tmp_path / "1.png", top=1).run()
    assert alone == [(from_files[1][0][0], pytest.approx(from_files[1][0][1], rel=1e-4))]
    assert "test image 0 (a " in capsys.readouterr().out


def test_prediction_refuses_what_is_no_image(run, tmp_path, capsys):
    (tmp_path / "x.png").write_text("not an image")
    with pytest.raises(SystemExit, match="1"):
        Predict(run[0], tmp_path).run()
    assert f"1 images could not be read:\n{tmp_path / 'x.png'}: cannot identify" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Predict(run[0], tmp_path / "nowhere").run()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_run(tmp_path)


def test_equal_seeds_give_equal_weights(tmp_path):
    def weights(seed, name):
        options = {"epochs": 1, "train_images": 128, "augment": "flip-crop", "quiet": True}
        Trainer(seed=seed, output=tmp_path / name, **options).run()
        return timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).state_dict()

    first, again, other = weights(0, "a"), weights(0, "b"), weights(1, "c")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_evaluation_counts_like_plain_python():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :7]

    logits = torch.randn(25, 1, 7, 1)
    labels = torch.randint(0, 7, (25,))
    result = evaluate(Fixed(), DataLoader(list(zip(logits, labels.tolist(), strict=True)), 4))
    rows = [[value.item() for value in row.flatten()] for row in logits]
    ranks = [sorted(row, reverse=True).index(row[label]) for row, label in zip(rows, labels.tolist(), strict=True)]
    losses = [
        math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in zip(rows, labels.tolist(), strict=True)
    ]
    assert result.top1 == pytest.approx(100 * sum(rank == 0 for rank in ranks) / 25)
    assert result.top5 == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 25)
    assert result.loss == pytest.approx(sum(losses) / 25, rel=1e-5)
    assert result.feedback_shares == []


def test_any_timm_model_trains_through_the_same_path(tmp_path):
    facts = Trainer(model="test_resnet", epochs=1, train_images=128, output=tmp_path, quiet=True).run()
    assert facts.settings == {}


def test_a_diverging_run_stops_with_a_diagnosis(tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf).*lr=1e\+30"):
        Trainer(lr=1e30, opt="sgd", warmup_epochs=0, epochs=2, train_images=256, output=tmp_path, quiet=True).run()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": -1.0}, "lr=-1"),
        ({"train_images": 10}, "10 training images are less than a batch of 64"),
        ({"model_args": {"feedback": -1}}, "feedback=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808 is too large"),
        ({"teacher_img_size": 64}, "teacher_img_size=64 is of a teacher, and there is none"),
        ({"teacher_img_size": 0}, "teacher_img_size=0 is too small"),
        ({"cache_teacher": True}, "cache_teacher=True is of a teacher, and there is none"),
        ({"data_dir": "."}, r"data_dir=\., but dataset=digits is embedded: give --dataset folder"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(**options, output=tmp_path).run()


def test_results_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "results.json"
    with replacing(path) as temporary:
        temporary.write_text("first")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("half of the sec")
            raise RuntimeError("in mid-write")

    with pytest.raises(RuntimeError, match="in mid-write"):
        write_half()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": "zero"}, "seed is 'zero'"), ({"extra": 1}, r"unknown fields \['extra'\]"), (None, "not JSON")],
)
def test_damaged_facts_are_refused(run, tmp_path, change, message):
    text = (run[0] / "results.json").read_text()
    path = tmp_path / "results.json"
    path.write_text(text[:50] if change is None else json.dumps({**json.loads(text), **change}))
    with pytest.raises(ValueError, match=message):
        RunFacts.load(path)


def test_grey_images_are_predicted_whatever_their_mode(run, tmp_path):
    Image.new("RGBA", (50, 70), (200, 10, 10, 128)).save(tmp_path / "x.png")
    assert len(Predict(run[0], tmp_path / "x.png").run()) == 1


@pytest.mark.slow
def test_quickstart_reaches_97_percent(tmp_path):
    """The quickstart's own options."""
    assert Trainer(epochs=15, batch_size=32, augment="crop", output=tmp_path, quiet=True).run().top1 >= 97


@pytest.fixture
def pictures(tmp_path):
    """Two classes of eight images, for training and for testing."""
    for part in ("train", "test"):
        for name in ("dark", "light"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for index in range(8):
                shade = 40 + index + 100 * (name == "light")
                Image.new("L", (16, 16), shade).save(tmp_path / "data" / part / name / f"{index}.png")
    return tmp_path / "data"


SMALL = {"dataset": "folder", "img_size": 16, "batch_size": 4, "epochs": 1, "quiet": True}
SMALL["model_args"] = {"architecture": [4, "M", 6, "M"]}


def damage(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no picture")


def test_images_none_of_which_can_be_read_are_named_before_the_training(pictures, tmp_path, capsys):
    damage(pictures / "train" / "dark")
    Trainer(**SMALL, data_dir=pictures, bad_images="skip", output=tmp_path / "run").run()
    assert "none of the training images can be read of: dark" in capsys.readouterr().err
    damage(pictures / "test")
    with pytest.raises(ValueError, match=r"None of the test images can be read\. .*/test/dark/0\.png"):
        Trainer(**SMALL, data_dir=pictures, bad_images="skip", output=tmp_path / "none").run()
    assert not (tmp_path / "none" / "args.yaml").exists()


def test_a_damaged_test_image_costs_no_training(pictures, tmp_path):
    """The model is there, and once the picture is repaired the run is tested."""
    path = pictures / "test" / "light" / "3.png"
    whole = path.read_bytes()
    damage(pictures / "test" / "light")
    with pytest.raises(UnreadableImage, match=r"light/0\.png is not .*The training is done: --resume goes on with its"):
        Trainer(**SMALL, data_dir=pictures, output=tmp_path / "run").run()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    for each in (pictures / "test" / "light").iterdir():
        each.write_bytes(whole)
    facts = Trainer(**SMALL, data_dir=pictures, output=tmp_path / "run", resume=True).run()
    assert facts.n_test == 16
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_images_that_a_run_left_out_are_left_out_again(pictures, tmp_path, capsys):
    (pictures / "test" / "light" / "3: x.png").write_text("no picture")
    facts = Trainer(**SMALL, data_dir=pictures, bad_images="skip", output=tmp_path / "run").run()
    assert facts.n_test == 16
    assert Validate(tmp_path / "run").run().top1 == facts.top1
    assert "1 test images are left out, as in training" in capsys.readouterr().err
    assert len(Predict(tmp_path / "run").run()) == 5
    with pytest.raises(UnreadableImage):
        Validate(tmp_path / "run", pictures, dataset="folder").run()


def test_what_chose_the_best_epoch_is_not_called_test_images(pictures, tmp_path):
    (pictures / "test").rename(pictures / "val")
    facts = Trainer(**SMALL, data_dir=pictures, output=tmp_path / "run").run()
    assert facts.tested_on == "validation"
    text = Card(tmp_path / "run").run().read_text()
    assert "16 training and 16 validation images" in text
    assert "Test accuracy" not in text
    assert "split: validation" in text


def test_classes_that_a_split_takes_from_training_are_told(pictures, tmp_path, capsys):
    for index in range(1, 8):
        (pictures / "train" / "light" / f"{index}.png").unlink()
    told = "none of the training images is left to train on of: light"
    for share, lost in {0.5: False, 0.6: True}.items():  # too few for each class to have its share
        Trainer(**SMALL, data_dir=pictures, val_split=share, output=tmp_path / str(share)).run()
        assert (told in capsys.readouterr().err) == lost


def test_names_of_folders_without_their_weights(pictures, tmp_path, capsys):
    Trainer(**SMALL, data_dir=pictures, output=tmp_path / "run").run()
    options = {**SMALL, "data_dir": pictures, "model_args": {}}
    Trainer(**options, model=f"local-dir:{tmp_path / 'run'}", output=tmp_path / "anew").run()
    assert "are not taken; --pretrained takes them" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"config\.json is no file of weights; give a run's folder"):
        Trainer(**options, initial_checkpoint=tmp_path / "run" / "config.json", output=tmp_path / "x").run()
    with pytest.raises(FileExistsError, match=r"results\.json is a file; expected a folder"):
        Trainer(**options, output=tmp_path / "run" / "results.json").run()
    with pytest.raises(FileNotFoundError, match="nothing does not exist; expected the folder of a run, or a name"):
        Export(str(tmp_path / "nothing")).run()


def test_looking_for_damaged_images_changes_no_weight(pictures, tmp_path):
    for what in ("skip", "stop"):
        Trainer(**SMALL, data_dir=pictures, bad_images=what, output=tmp_path / what).run()
    assert (tmp_path / "skip/model.safetensors").read_bytes() == (tmp_path / "stop/model.safetensors").read_bytes()


def test_in_python_paths_may_be_strings(pictures, tmp_path):
    first = Trainer(**SMALL, data_dir=str(pictures), output=str(tmp_path / "first"), checkpoint_interval=2).run()
    start = str(tmp_path / "first")
    Trainer(**SMALL, data_dir=str(pictures), output=str(tmp_path / "second"), initial_checkpoint=start).run()
    assert Validate(start, data_dir=str(pictures), output=str(tmp_path / "v.json")).run().top1 == first.top1
    assert len(Predict(start, str(pictures / "test"), output=str(tmp_path / "p.csv")).run()) == 16
    Card(start).run()
    Plot(start, output=str(tmp_path / "curves.png")).run()


def test_a_run_is_tested_on_its_own_images(pictures, tmp_path, capsys):
    """Wherever they were in training, of a run that ended and of one that was stopped; a data set that is named is not
    looked for there."""
    run = tmp_path / "run"
    facts = Trainer(**SMALL, data_dir=pictures, output=run).run()
    check = {"batch_size": 4, "img_size": 16}
    for _ in range(2):
        assert Validate(run).run().top1 == facts.top1
        assert len(Predict(run).run()) == 5
        (own,), (given,) = Gradcheck(str(run), **check).run(), Gradcheck(str(run), data_dir=pictures, **check).run()
        assert own.residuals == given.residuals
        (run / "results.json").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="needs --data-dir"):
        Validate(run, dataset="folder").run()
    pictures.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=str(pictures)):
        Validate(run).run()
    shutil.rmtree(tmp_path / "elsewhere" / "train")  # which no test needs
    assert Validate(run, tmp_path / "elsewhere").run().top1 == facts.top1
    assert len(Predict(run, data_dir=tmp_path / "elsewhere").run()) == 5
    (run / "args.yaml").unlink()
    with pytest.raises(ValueError, match="does not say what images"):
        Gradcheck(str(run)).run()


def test_the_noise_of_a_device_is_the_same_in_every_test(pictures, tmp_path):
    noisy = {**SMALL, "model_args": {**SMALL["model_args"], "state_noise": 0.5}}
    Trainer(**noisy, data_dir=pictures, output=tmp_path / "run").run()
    losses = [Validate(tmp_path / "run", data_dir=pictures, batch_size=4).run().loss for _ in range(2)]
    with (tmp_path / "run" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert losses[0] == losses[1] == pytest.approx(float(row["test_loss"]), rel=1e-6)


def test_a_full_disk_is_said_of_the_file_that_it_kept_from_being_written(tmp_path, monkeypatch):
    message = r"No space left on device: '.*summary\.csv'"
    with pytest.raises(OSError, match=message), replacing(tmp_path / "summary.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_for_hf", full)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written: I/O error: No space left"):
        Trainer(epochs=1, train_images=64, model_args=SMALL["model_args"], output=tmp_path, quiet=True).run()
    assert not list(tmp_path.glob(".model-*"))
