"""Publish and pull over real HTTP to `hub_server`, with the unmodified clients of huggingface_hub and timm."""

import copy
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from PIL import Image
from safetensors.torch import load_file, save
from timm.data import resolve_data_config
from torch.utils.data import DataLoader

from hub_client import Client
from hub_server import HubServer
from runs import LABELS, SETTINGS, Bomb, changed_config, changed_weights, make_facts, make_run, pickled_weights
from timm_ep import cli
from timm_ep.data.datasets import open_data
from timm_ep.data.transforms import run_transform
from timm_ep.hub import publishing as hub
from timm_ep.hub.cards import Card
from timm_ep.hub.export import prepare
from timm_ep.training.evaluate import Validate, evaluate, load_run
from timm_ep.training.predict import Predict

ALICE, BOB, READER = "hf_alicealicealicealice", "hf_bobbobbobbobbobbob", "hf_readerreaderreader"
FILES = {"README.md", "config.json", "model.safetensors", "results.json", "summary.csv", "curves.png", ".gitattributes"}
ID = "alice/ep_vgg5_025.insects"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def site(server):
    """The server, empty."""
    server.repositories.clear()
    server.objects.clear()
    server.faults.clear()
    server.requests.clear()
    server.tokens = {ALICE: ("alice", True), BOB: ("bob", True), READER: ("alice", False)}
    server.large, server.part_size = lambda path, size: path.endswith((".safetensors", ".bin")), None
    yield server
    assert server.leaked == [], "an access token went to the CDN"


@pytest.fixture(scope="session")
def client(server, tmp_path_factory):
    client = Client(server.url, tmp_path_factory.mktemp("hf"))
    yield client
    client.pool.shutdown()
    for token in (ALICE, BOB, READER, "hf_wrongwrongwrongwrong"):
        assert token not in client.output, "an access token was printed, logged or raised"


@pytest.fixture
def cache(client):
    """The client's cache, empty."""
    shutil.rmtree(client.home / "hub", ignore_errors=True)
    return client


def publish(*args, **options) -> str:
    return hub.Publish(*args, **options).run()


def pull(*args, **options) -> Path:
    return hub.Pull(*args, **options).run()


def published(site) -> dict[str, bytes]:
    """Files of the repository but what its creation puts there; nothing if it does not exist."""
    tree = site.repositories[ID].tree() if ID in site.repositories else {}
    return {name: content for name, content in tree.items() if name != ".gitattributes"}


# Round trip


@pytest.mark.parametrize("kind", ["regular", "lfs", "multipart"])
def test_round_trip(site, cache, run, tmp_path, kind):
    """What comes back by timm's `hf-hub:`, and by `pull`, is the model: weights, logits, settings, names of classes."""
    site.large = (lambda path, size: False) if kind == "regular" else site.large
    site.part_size = 300_000 if kind == "multipart" else None
    address = cache(publish, run, ID)
    repository = site.repositories[ID]
    assert set(repository.tree()) == FILES
    assert repository.log == ["initial commit", "Add ep_vgg5_025.insects"]  # one commit holds it all
    assert address == f"{site.url}/{ID}/commit/{repository.oid('main')}"
    uploads = [request for request in site.requests if request.startswith("PUT")]
    assert len(uploads) == {"regular": 0, "lfs": 1, "multipart": 4}[kind]

    original = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    by_timm = cache(timm.create_model, f"hf-hub:{ID}", pretrained=True).eval()
    cache(pull, ID, tmp_path / "pulled")
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == FILES - {".gitattributes"}
    pulled = timm.create_model(f"local-dir:{tmp_path / 'pulled'}", pretrained=True).eval()
    images = torch.randn(2, 1, 32, 32)
    for model in (by_timm, pulled):
        for name, tensor in original.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(model(images), original(images))
        assert model.settings == original.settings
        assert {name: getattr(model, name) for name in SETTINGS} == SETTINGS
        assert list(model.pretrained_cfg["label_names"]) == LABELS
        assert resolve_data_config({}, model=model) == resolve_data_config({}, model=original)

    tuned = timm.create_model(f"local-dir:{tmp_path / 'pulled'}", pretrained=True, num_classes=3)
    start, labels = copy.deepcopy(tuned.state_dict()), torch.tensor([0, 2])
    assert torch.equal(start["layers.0.weight"], original.state_dict()["layers.0.weight"])
    assert tuned.gradient == "ep"
    optimizer, losses = torch.optim.SGD(tuned.parameters(), lr=0.05), []
    for _ in range(5):
        loss = F.cross_entropy(tuned(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert not any(torch.equal(start[name], value) for name, value in tuned.named_parameters())


def test_what_timm_itself_pushed_is_pulled_tested_and_predicted_with(site, cache, tmp_path):
    """Without facts of a training or names of classes, with a pickle beside the safetensors, which stays there."""
    model = timm.create_model("ep_vgg5_025", num_classes=10, in_chans=1, **SETTINGS).eval()
    cache(timm.models.push_to_hf_hub, model, ID)
    assert "pytorch_model.bin" in site.repositories[ID].tree()
    folder = cache(pull, ID, tmp_path / "pulled")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    loaded, facts = load_run(folder)
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert facts is None
    tested = Validate(folder, dataset="digits").run()
    assert tested.top1 == evaluate(model, digits_of(model)).top1
    with pytest.raises(ValueError, match="does not say what images it was trained on; give --dataset"):
        Validate(folder).run()
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    assert len(Predict(folder, tmp_path / "a.png").run()) == 1
    cache(publish, make_run(tmp_path / "newer"), ID)
    assert "pytorch_model.bin" not in site.repositories[ID].tree()  # it would be the old weights beside the new


def digits_of(model):
    data = open_data("digits")
    data.test.transform = run_transform(model)
    return DataLoader(data.test, 64)


def test_a_dry_run_is_exactly_what_would_appear(site, cache, run, tmp_path):
    cache(cli.main, ["publish", str(run), "--repo-id", ID, "--dry-run", "--output", str(tmp_path / "dry")])
    assert not site.repositories
    assert not site.requests
    cache(cli.main, ["publish", str(run), f"--repo-id={ID}"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "dry").iterdir()} == published(site)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        hub.Publish(run, ID, dry_run=True, output=tmp_path / "dry").run()


def test_a_private_repository_is_for_its_owner(site, cache, run, tmp_path):
    cache(publish, run, ID, private=True)
    assert site.repositories[ID].private
    for token in (BOB, None):
        with pytest.raises(FileNotFoundError, match=r"no such repository, or a private one that this token may not"):
            cache(pull, ID, tmp_path / "stolen", token=token)
    assert cache(pull, ID, tmp_path / "own").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"own"}


def test_revisions_and_pull_requests_leave_main_alone(site, cache, run, tmp_path):
    cache(publish, run, ID)
    main = site.repositories[ID].oid("main")
    other = make_run(tmp_path / "other", seed=1)
    cache(publish, other, ID, revision="v2")
    address = cache(publish, other, ID, create_pr=True, token=BOB)  # who may not write there
    assert address == f"{site.url}/{ID}/discussions/1"
    assert site.repositories[ID].oid("main") == main
    for revision in ("v2", "refs/pr/1"):
        folder = cache(pull, ID, tmp_path / revision[-1], revision=revision)
        assert torch.equal(
            load_file(folder / "model.safetensors")["head.fc.weight"],
            load_file(other / "model.safetensors")["head.fc.weight"],
        )
    with pytest.raises(FileNotFoundError, match="no such revision"):
        cache(pull, ID, tmp_path / "x", revision="v3")
    with pytest.raises(ValueError, match="revision is empty"):
        pull(ID, tmp_path / "x", revision="")
    cache(publish, make_run(tmp_path / "wide", architecture="ep_vgg5_050"), "alice/wide")
    site.repositories[ID].commit("v4", site.repositories["alice/wide"].tree(), "another net")
    with pytest.raises(FileExistsError, match="holds the architecture 'ep_vgg5_050'"):  # there, whatever main holds
        cache(publish, run, ID, revision="v4")
    with pytest.raises(ValueError, match="A pull request is to the main branch"):
        publish(run, ID, revision="v2", create_pr=True)


def test_an_existing_repository(site, cache, run, tmp_path):
    """The same again changes nothing; other weights of the same net are one more commit; anything else is refused."""
    cache(publish, run, ID)
    cache(publish, run, ID)
    assert len(site.repositories[ID].log) == 2
    cache(publish, make_run(tmp_path / "retrained", seed=1), ID)
    assert len(site.repositories[ID].log) == 3
    assert "results.json" in published(site)
    bare = make_run(tmp_path / "of unknown training", seed=2)
    (bare / "results.json").unlink()
    cache(publish, bare, ID)
    kept = published(site)
    assert set(kept) == {"README.md", "config.json", "model.safetensors"}  # no facts of other weights
    with pytest.raises(FileExistsError, match="holds the architecture 'ep_vgg5_025'; choose another name"):
        cache(publish, make_run(tmp_path / "wider", architecture="ep_vgg5_050"), ID)
    with pytest.raises(FileExistsError, match="is public; make it private"):
        cache(publish, run, ID, private=True)
    assert published(site) == kept
    site.add("alice/notes", {"thesis.tex": b"x"})
    with pytest.raises(FileExistsError, match=r"holds other files, such as 'thesis.tex'"):
        cache(publish, run, "alice/notes")
    site.add("alice/broken", {"config.json": b"[" * 100_000})
    with pytest.raises(FileExistsError, match="choose another name"):
        cache(publish, run, "alice/broken")


def test_checkpoints(site, cache, run, tmp_path):
    """A checkpoint of PyTorch or safetensors beside its config is published as safetensors, in its dtype."""
    state = {name: tensor.bfloat16() for name, tensor in load_file(run / "model.safetensors").items()}
    shutil.copy(run / "config.json", tmp_path)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "last.pth.tar")
    cache(publish, tmp_path / "last.pth.tar", ID)
    assert set(published(site)) == {"README.md", "config.json", "model.safetensors"}
    assert b"What trained these weights was not recorded" in published(site)["README.md"]
    weights = cache(pull, ID, tmp_path / "pulled") / "model.safetensors"
    for name, tensor in load_file(weights).items():
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="No facts of the training"):
        prepare(tmp_path / "last.pth.tar", tmp_path / "out", ID, dataset_id="uoft-cs/cifar10")
    (tmp_path / "words.pth").write_text("hello world")
    with pytest.raises(ValueError, match="is not a checkpoint that can be read without running code"):
        prepare(tmp_path / "words.pth", tmp_path / "out", ID)
    torch.save({**state, "head.fc.bias": state["head.fc.bias"].to_sparse()}, tmp_path / "sparse.pth")
    with pytest.raises(ValueError, match="holds more than tensors of numbers"):
        prepare(tmp_path / "sparse.pth", tmp_path / "out", ID)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match="not a checkpoint that can be read without running code"):
        prepare(tmp_path / "evil.pth", tmp_path / "out", ID)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out").exists()


def test_large_releases_are_found_by_hub_id(site, cache, run):
    """`hf_hub_id` in a pretrained cfg, as `default_cfgs` has for weights that do not ship with the package."""
    cache(publish, run, ID)
    overlay = {"hf_hub_id": ID, "num_classes": 4, "input_size": (1, 32, 32)}
    model = cache(timm.create_model, "ep_vgg5_025", pretrained=True, pretrained_cfg_overlay=overlay)
    for name, tensor in load_file(run / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)


# Faults of publishing

ALWAYS = 1000


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (("PUT", "/lfs/", {"drop_upload": 200_000, "times": ALWAYS}), ConnectionError, "the connection broke"),
        (("POST", "/commit/", {"drop_upload": 500}), ConnectionError, "the connection broke"),
        (("POST", "/repos/create", {"drop_upload": 1}), ConnectionError, "the connection broke"),
        (("POST", "/commit/", {"status": 500}), ConnectionError, r"an error of its own \(500\)"),
        (("POST", "preupload", {"status": 500, "times": ALWAYS}), ConnectionError, r"an error of its own \(500\)"),
        (("PUT", "/lfs/", {"status": 503, "times": ALWAYS}), ConnectionError, r"an error of its own \(503\)"),
        (("POST", "/commit/", {"status": 429, "times": ALWAYS}), ConnectionError, "too many requests"),
        (("POST", "/commit/", {"status": 401}), PermissionError, "refuses the access token"),
        (("POST", "/commit/", {"status": 403}), PermissionError, "may not write there"),
        (("POST", "/commit/", {"status": 409}), OSError, "409"),
        (("POST", "/commit/", {"status": 400}), OSError, "Bad request for commit endpoint: .*ordered by the test"),
        (("POST", "validate-yaml", {"status": 502, "html": True}), ConnectionError, "what answers is not the Hub"),
    ],
)
def test_a_publication_that_fails_leaves_nothing_and_a_repeat_completes(site, cache, run, fault, error, message):
    method, path, what = fault
    site.fail(method, path, **what)
    with pytest.raises(error, match=message) as raised:
        cache(publish, run, ID)
    assert str(raised.value).startswith(f"Publishing to {ID} failed: ")
    assert "\n" not in str(raised.value)
    assert published(site) == {}
    site.faults.clear()
    cache(publish, run, ID)
    assert set(published(site)) == FILES - {".gitattributes"}


@pytest.mark.parametrize(
    "fault",
    [
        ("PUT", "/lfs/", {"drop_upload": 200_000}),
        ("PUT", "/lfs/", {"status": 500}),
        ("POST", "/repos/create", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("POST", "preupload", {"status": 429}),
        ("POST", "/commit/", {"status": 429, "times": 2}),
        ("GET", "/api/models/", {"status": 429}),
    ],
)
def test_passing_faults_are_outlived(site, cache, run, fault):
    method, path, what = fault
    site.fail(method, path, **what)
    cache(publish, run, ID)
    assert set(published(site)) == FILES - {".gitattributes"}
    assert [fault.times for fault in site.faults] == [0]
    assert len(site.repositories[ID].log) == 2


def test_a_lost_answer_to_a_commit_is_not_committed_twice(site, cache, run):
    site.fail("POST", "/commit/", drop_download=5)
    with pytest.raises(ConnectionError, match="the connection broke"):
        cache(publish, run, ID)
    assert set(published(site)) == FILES - {".gitattributes"}  # it had arrived
    cache(publish, run, ID)
    assert len(site.repositories[ID].log) == 2


def test_who_may_not_publish(site, cache, run):
    for token, message in {
        None: "needs an access token",
        "hf_wrongwrongwrongwrong": "refuses the access token",
        READER: "may not write there",
        BOB: "may not write there",
    }.items():
        with pytest.raises(PermissionError, match=message):
            cache(publish, run, ID, token=token)
        assert site.repositories == {}
    site.add(ID, {})
    for token in (READER, BOB):
        with pytest.raises(PermissionError, match="may not write there"):
            cache(publish, run, ID, token=token)
    assert published(site) == {}


def test_no_upload_begins_with_a_model_that_fails_its_checks(site, cache, run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "broken")
    state = load_file(run / "model.safetensors")
    state["head.fc.bias"][0] = float("nan")
    (broken / "model.safetensors").write_bytes(save(state))
    with pytest.raises(ValueError, match=r"head.fc.bias has values that are NaN"):
        cache(publish, broken, ID)
    assert site.requests == []


# Faults of pulling


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (("GET", "/cdn/", {"drop_download": 1000, "times": ALWAYS}), ConnectionError, "the connection broke"),
        (("GET", "/cdn/", {"drop_download": 0, "times": ALWAYS}), ConnectionError, "the connection broke"),
        (("GET", "config.json", {"drop_download": 3, "times": ALWAYS}), ConnectionError, "the connection broke"),
        (("GET", "/cdn/", {"status": 500}), ConnectionError, r"an error of its own \(500\)"),
        (("HEAD", "resolve", {"status": 500, "times": ALWAYS}), ConnectionError, r"an error of its own \(500\)"),
        (("GET", "/api/models/", {"status": 429, "times": ALWAYS}), ConnectionError, "too many requests"),
        (("GET", "/api/models/", {"status": 403}), PermissionError, "this token may not read there"),
        (
            ("HEAD", "resolve", {"status": 403, "headers": {"X-Error-Code": "GatedRepo"}, "times": ALWAYS}),
            PermissionError,
            "the repository is gated; accept its conditions",
        ),
        (("GET", "/api/models/", {"html": True}), ConnectionError, "what answers is not the Hub"),
    ],
)
def test_a_pull_that_fails_leaves_nothing_and_a_repeat_completes(site, cache, run, tmp_path, fault, error, message):
    cache(publish, run, ID)
    method, path, what = fault
    site.fail(method, path, **what)
    with pytest.raises(error, match=message) as raised:
        cache(pull, ID, tmp_path / "pulled")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert cache.cached() == []
    site.faults.clear()
    cache(pull, ID, tmp_path / "pulled")
    assert load_file(tmp_path / "pulled" / "model.safetensors").keys() == load_file(run / "model.safetensors").keys()


@pytest.mark.parametrize(
    "fault",
    [
        ("GET", "/cdn/", {"drop_download": 100_000}),
        ("GET", "/cdn/", {"status": 429}),
        ("HEAD", "resolve", {"status": 429}),
        ("GET", "/api/models/", {"status": 429, "times": 3, "headers": {"Retry-After": "2"}}),
    ],
)
def test_a_pull_outlives_passing_faults(site, cache, run, tmp_path, fault):
    cache(publish, run, ID)
    method, path, what = fault
    site.fail(method, path, **what)
    folder = cache(pull, ID, tmp_path / "pulled")
    assert (folder / "model.safetensors").read_bytes() == published(site)["model.safetensors"]


def test_timms_own_path_caches_nothing_half(site, cache, run):
    """A download by `hf-hub:` that breaks: no weights in the cache, and a repeat loads them all."""
    cache(publish, run, ID)
    site.fail("GET", "/cdn/", drop_download=1000, times=ALWAYS)
    with pytest.raises(Exception, match="peer closed connection"):
        cache(timm.create_model, f"hf-hub:{ID}", pretrained=True)
    assert all(path.stat().st_size < 10_000 for path in cache.cached())
    site.faults.clear()
    model = cache(timm.create_model, f"hf-hub:{ID}", pretrained=True)
    assert torch.equal(model.head.fc.weight, load_file(run / "model.safetensors")["head.fc.weight"])


def pull_with_small_files(*args) -> None:
    """`pull` in a process that may write files of 200 kB at most."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        pull(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_at_download(site, cache, run, tmp_path):
    """On a disk of 300 kB, where this process may mount one; else with a limit on the size of files."""
    cache(publish, run, ID)
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True, check=False
        ).returncode
    )
    try:
        with pytest.raises(OSError, match=r"No space left on device|File too large") as raised:
            cache(pull if mounted else pull_with_small_files, ID, tmp_path / "pulled")
        assert str(raised.value).startswith(f"Pulling {ID} failed: ")
        assert list(tmp_path.iterdir()) == []
    finally:
        if mounted:
            subprocess.run(["umount", tmp_path], check=True)
    assert cache.cached() == []
    assert cache(pull, ID, tmp_path / "pulled").is_dir()


def test_a_link_to_nowhere_is_refused_before_anything_is_fetched(site, cache, run, tmp_path):
    cache(publish, run, ID)
    site.requests.clear()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="is a link to nowhere, which is not there"):
        cache(pull, ID, tmp_path / "link")
    assert site.requests == []


def test_nothing_is_pulled_over_what_is_there(site, cache, run, tmp_path):
    cache(publish, run, ID)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        cache(pull, ID, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# Hostile repositories


def hostile(run: Path, **changes: bytes | None) -> dict[str, bytes]:
    """The files of a good repository, some replaced or (None) left out."""
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    files.update({name.replace("__", "."): content for name, content in changes.items()})
    return {name: content for name, content in files.items() if content is not None}


HOSTILE = {
    "another architecture": (
        lambda run: hostile(run, config__json=changed_config(run, architecture="resnet18")),
        r"architecture 'resnet18' is not of this package",
    ),
    "unknown arguments": (
        lambda run: hostile(run, config__json=changed_config(run, model_args={"in_chans": 1, "__import__": "os"})),
        r"model_args.__import__' is not accepted",
    ),
    "weights elsewhere": (
        lambda run: hostile(run, config__json=changed_config(run, pretrained_cfg={"url": "http://x/w.pth"})),
        r"pretrained_cfg.url' is not accepted",
    ),
    "no configuration": (lambda run: hostile(run, config__json=None), "has no config.json"),
    "no JSON": (lambda run: hostile(run, config__json=b"[" * 100_000), "is not JSON"),
    "a header of 1 GB": (
        lambda run: hostile(run, model__safetensors=(10**9).to_bytes(8, "little") + b"{" * 64),
        "announces a header of 1,000,000,000 bytes",
    ),
    "NaN": (
        lambda run: hostile(
            run, model__safetensors=changed_weights(run, lambda s: s["layers.1.bias"].fill_(float("nan")))
        ),
        r"layers.1.bias has values that are NaN",
    ),
    "a missing key": (
        lambda run: hostile(run, model__safetensors=changed_weights(run, lambda s: s.pop("layers.1.bias"))),
        r"missing \['layers.1.bias'\]",
    ),
    "an absolute path": (lambda run: hostile(run, **{"/etc/passwd": b"x"}), "would leave its folder"),
    "a path upwards": (lambda run: hostile(run, **{"a/../../.bashrc": b"x"}), "would leave its folder"),
    "a path of Windows": (lambda run: hostile(run, **{"..\\evil": b"x"}), "would leave its folder"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_repositories_are_refused(site, cache, run, tmp_path, what):
    files, message = HOSTILE[what]
    site.add("eve/model", files(run))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cache(pull, "eve/model", tmp_path / "pulled")
    assert list(tmp_path.iterdir()) == []
    assert cache.cached() == []


@pytest.mark.parametrize("size", [-1, -(10**30), 10**15, 10**400, None, "many", 1.5])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_strange_sizes_are_refused_before_a_download(site, cache, run, tmp_path, name, size):
    site.add("eve/model", hostile(run, **{"README.md": b"x"})).claimed_sizes[name] = size
    with pytest.raises((ValueError, OSError), match=rf"{name} has .* bytes; expected 0 to|int"):
        cache(pull, "eve/model", tmp_path / "pulled")
    assert not any(request.startswith("GET") and name in request for request in site.requests)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.pkl"])
def test_pickles_are_not_opened(site, cache, run, tmp_path, name):
    """Nor run by timm's own `hf-hub:` and `local-dir:`, which read them with `weights_only`: that is timm's to keep."""
    marker = tmp_path / "exploded"
    files = hostile(run, model__safetensors=None, **{name: pickled_weights(run, marker)})
    site.add("eve/model", files)
    with pytest.raises(FileNotFoundError, match=rf"only safetensors are read, and none of .*{name}.* is opened"):
        cache(pull, "eve/model", tmp_path / "pulled")
    with pytest.raises((RuntimeError, EntryNotFoundError), match=r"weights_only=True blocked|Entry Not Found"):
        cache(timm.create_model, "hf-hub:eve/model", pretrained=True)
    (tmp_path / "local").mkdir()
    for file, content in files.items():
        (tmp_path / "local" / file).write_bytes(content)
    with pytest.raises(RuntimeError, match=r"weights_only=True blocked|No suitable checkpoints"):
        timm.create_model(f"local-dir:{tmp_path / 'local'}", pretrained=True)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))  # noqa: S301
    assert marker.exists(), "the bomb is a dud"


def test_timms_own_path_refuses_weights_that_are_not_the_models(site, cache, run):
    """timm is lenient where the read-out is new; the models' own filter is not."""
    site.add("eve/nan", hostile(run, model__safetensors=HOSTILE["NaN"][0](run)["model.safetensors"]))
    site.add("eve/holes", hostile(run, model__safetensors=HOSTILE["a missing key"][0](run)["model.safetensors"]))
    for options in ({}, {"num_classes": 7}):
        with pytest.raises(ValueError, match="NaN"):
            cache(timm.create_model, "hf-hub:eve/nan", pretrained=True, **options)
        with pytest.raises(ValueError, match=r"missing \['layers.1.bias'\]"):
            cache(timm.create_model, "hf-hub:eve/holes", pretrained=True, **options)


# Tokens


def test_tokens_are_neither_printed_nor_published(site, cache, tmp_path):
    """Typed where it does not belong: in the training's command, in a repository's id, as an option."""
    secret = "hf_RecognisableFakeToken0123456789"
    site.tokens[secret] = ("alice", True)
    run = make_run(tmp_path / "run", command=f"timm-ep train --token {secret} --url https://me:{secret}@x.org/")
    (run / "summary.csv").write_text(f"epoch,train_loss,train_accuracy,{secret}\n1,1.5,40,{secret}\n")
    results = json.loads((run / "results.json").read_text())
    results["command"] = f"timm-ep train --token {secret}"  # as an older version would have written it
    (run / "results.json").write_text(json.dumps(results))
    cfg = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    (run / "config.json").write_bytes(changed_config(run, pretrained_cfg={**cfg, "description": f"see {secret}"}))
    cache(publish, run, ID, token=secret)
    assert b"see ***" in published(site)["config.json"]
    for content in published(site).values():
        assert secret.encode() not in content
    assert b"--token ***" in published(site)["README.md"]
    for repo_id in (secret, f"{secret}/model", f"https://alice:{secret}@hub.org/alice/x", f"alice/{secret}"):
        with pytest.raises(ValueError, match=r"is no repository's id; expected user/name"):
            cache(publish, run, repo_id, token=secret)
        with pytest.raises(ValueError, match=r"is no repository's id; expected user/name"):
            cache(pull, repo_id, tmp_path / "x", token=secret)
        with pytest.raises(ValueError, match="revision holds an access token"):
            cache(pull, ID, tmp_path / "x", revision=secret, token=secret)
        for command in (["pull", repo_id], ["publish", str(run), "--repo-id", repo_id], ["train", f"--lr={repo_id}"]):
            with pytest.raises(SystemExit):
                cache(cli.main, command, token=secret)
    assert "an option holds an access token" in cache.output
    for status in (401, 403, 500):
        site.fail("GET", "/api/models/", status=status)
        with pytest.raises(OSError, match="failed"):
            cache(pull, ID, tmp_path / "x", token=secret)
    assert secret not in cache.output


@pytest.mark.parametrize(
    "error",
    [
        HTTPError("GET https://me:sesame@hub.org/api broke"),
        OSError("hf_RecognisableFakeToken0123456789"),
        OSError(2, "No such file", "/hf_RecognisableFakeToken0123456789"),
    ],
)
def test_errors_are_passed_on_without_secrets(error):
    with pytest.raises(OSError, match=r"\*\*\*") as raised, hub._plain_errors("pulling"):
        raise error
    told = "".join(traceback.format_exception(raised.value))
    assert not re.search("sesame|Recognisable", told.split("raise error")[-1])


@pytest.mark.slow
def test_the_command_line_end_to_end(site, run, tmp_path):
    """Real processes, an endpoint with a password in it, and a token of no known form."""
    odd = "aQ9-unusual-token-form"
    site.tokens[odd] = ("alice", True)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": site.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": odd,
    }

    def timm_ep(*words: str, **changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "timm_ep", *words],
            cwd=tmp_path,
            env={**environment, **changes},
            capture_output=True,
            text=True,
            check=False,
        )

    done = timm_ep("publish", str(run), "--repo-id", ID, "--private")
    assert done.returncode == 0, done.stderr
    assert f'timm.create_model("hf-hub:{ID}", pretrained=True)' in done.stdout
    assert site.repositories[ID].private
    assert timm_ep("pull", ID).returncode == 0
    assert (tmp_path / "hub" / ID / "model.safetensors").exists()
    lost = timm_ep("pull", ID, "--output", "x", HF_ENDPOINT="http://me:sesame@127.0.0.1:9")
    assert lost.returncode == 2
    assert lost.stderr.startswith(f"timm-ep pull: error: Pulling {ID} failed: ")
    for told in (done, lost):
        assert odd not in told.stdout + told.stderr
        assert "sesame" not in told.stdout + told.stderr


# The card at work


def test_the_cards_snippets_run(site, cache, run, tmp_path):
    """Every Python block of a published card, against the Hub it names."""
    cache(publish, run, ID)
    blocks = re.findall(r"```python\n(.*?)```", published(site)["README.md"].decode(), re.S)
    assert len(blocks) == 4
    Image.new("RGB", (40, 50), (200, 30, 30)).save(tmp_path / "image.png")
    for block in blocks:
        assert f'"hf-hub:{ID}"' in block
        assert "import timm_ep" in block
        cache(execute, block, tmp_path)
    assert re.search(r"^(ant|bee|<b>cat</b>|dög) 0\.\d+$", cache.output, re.M)
    assert "torch.Size([2, 128, 2, 2])" in cache.output


def execute(code: str, folder: Path) -> None:
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, "card", "exec"), {})
    finally:
        os.chdir(before)


def test_the_licence_is_the_publishers_to_choose(run, tmp_path):
    for licence, expected in ((None, "apache-2.0"), ("cc-by-nc-4.0", "cc-by-nc-4.0")):
        folder = tmp_path / str(licence)
        hub.Publish(run, ID, dry_run=True, output=folder, license=licence).run()
        assert f"\nlicense: {expected}\n" in (folder / "README.md").read_text()
        config = json.loads((folder / "config.json").read_text())
        assert config["pretrained_cfg"].get("license", config.get("license", "apache-2.0")) == expected


def test_published_again_it_keeps_its_twin_and_its_name(run, tmp_path, capsys):
    """Under a name that a released model has too, which is another."""
    name = "alice/ep_vgg5_025.ep_digits"
    (tmp_path / "twin").mkdir()
    make_facts(settings={**make_facts().settings, "gradient": "backprop"}).save(tmp_path / "twin" / "results.json")
    hub.Publish(run, name, dry_run=True, output=tmp_path / "one", twin=tmp_path / "twin").run()
    Card(tmp_path / "one", check=True).run()
    hub.Publish(tmp_path / "one", name, dry_run=True, output=tmp_path / "two").run()
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="dataset_id='mnist' is no dataset's id"):
        hub.Publish(run, name, dry_run=True, output=tmp_path / "three", dataset_id="mnist").run()
