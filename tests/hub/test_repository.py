"""A repository is checked before it is read: what is refused, what is accepted, and random changes of both."""

import copy
import json
import os
import struct
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from timm.models import save_for_hf

from runs import Bomb, changed_config, changed_weights, make_facts, make_run, pickled_weights
from timm_ep import EpVgg
from timm_ep.core.settings import SETTING_NAMES
from timm_ep.hub.repository import load, read_config, verify, verify_config, verify_weights
from timm_ep.training.evaluate import Validate, load_run
from timm_ep.training.predict import Predict

EXAMPLES = int(os.environ.get("TIMM_EP_FUZZ", "200"))  # of each fuzz test
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("good"))


@pytest.fixture
def run(good, tmp_path):
    """A repository to spoil."""
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_run_passes_and_loads_as_timm_loads_it(run):
    assert {tensor.device.type for tensor in verify(run).state_dict().values()} == {"meta"}
    images = torch.randn(2, 1, 32, 32)
    expected = timm.create_model(f"local-dir:{run}", pretrained=True).eval()(images)
    assert torch.equal(load(run)(images), expected)
    assert torch.equal(load_run(run)[0](images), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet18"}, r"architecture 'resnet18' is not of this package"),
        ({"architecture": "../ep_vgg5_025"}, r"is not of this package"),
        ({"architecture": ["ep_vgg5_025"]}, r"architecture is \['ep_vgg5_025'\], of a kind"),
        ({"model_args": {"in_chans": 1, "device": "cuda"}}, r"'model_args.device' is not accepted"),
        ({"model_args": {"architecture": [4, "M", 10**9]}}, r"model_args.architecture is \[4, 'M', 1000000000\]"),
        ({"model_args": {"architecture": ["M", 4]}}, r"model_args: architecture=\['M', 4\]: item 0 pools"),
        ({"model_args": {"in_chans": 1, "feedback": -1}}, r"model_args: feedback=-1"),
        ({"model_args": {"in_chans": 1, "feedback": float("nan")}}, r"model_args.feedback is nan"),
        ({"model_args": {"in_chans": 1, "free_sweeps": 10**9}}, r"model_args.free_sweeps is 1000000000"),
        ({"model_args": {"in_chans": 1, "num_classes": 5}}, r"num_classes is 4, but 5 in model_args"),
        ({"model_args": {"in_chans": -1}}, r"model_args.in_chans is -1"),
        ({"model_args": {"in_chans": 1, "state_bits": 2000}}, r"model_args.state_bits is 2000"),
        ({"model_args": {"in_chans": 1, "padding": 20_000}}, r"model_args.padding is 20000"),
        ({"model_args": {"architecture": [4] * 64, "unit": 1e6}}, r"model_args: "),
        ({"model_args": 3}, r"model_args is 3"),
        ({"num_classes": 10**12}, r"num_classes is 1000000000000, of a kind or size"),
        ({"num_classes": True}, r"num_classes is True"),
        ({"label_names": ["a"]}, r"1 label names for 4 classes"),
        ({"label_names": ["\x1b[2J", "b", "c", "d"]}, r"label_names is "),
        ({"pretrained_cfg": {"file": "/etc/passwd"}}, r"'pretrained_cfg.file' is not accepted"),
        ({"pretrained_cfg": {"hf_hub_filename": "../../x"}}, r"'pretrained_cfg.hf_hub_filename' is not accepted"),
        ({"pretrained_cfg": {"custom_load": True}}, r"pretrained_cfg.custom_load is True"),
        ({"pretrained_cfg": {"std": [0.0]}}, r"pretrained_cfg.std is \[0.0\]"),
        ({"pretrained_cfg": {"mean": [0.5, 0.5]}}, r"mean has 2 values for 1 channels"),
        ({"pretrained_cfg": {"input_size": [1, 10**9, 10**9]}}, r"pretrained_cfg.input_size is"),
    ],
)
def test_hostile_configurations_are_refused(run, change, message):
    (run / "config.json").write_bytes(changed_config(run, **change))
    for check in (verify, load):
        with pytest.raises(ValueError, match=message):
            check(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1]", "holds a list; expected an object"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"num_classes": 1' + b"0" * 10_000 + b"}", "is not JSON"),
        (b"{}", r"lacks \['architecture', 'model_args', 'num_classes', 'pretrained_cfg'\]"),
        (b" " * 5_000_000, r"has 5,000,000 bytes; a configuration has at most 4,000,000"),
    ],
)
def test_what_is_no_configuration_is_refused(run, text, message):
    (run / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        verify(run)


def header(content: dict, data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x05", "not a safetensors file"),
        (struct.pack("<Q", 10**9), "announces a header of 1,000,000,000 bytes"),
        (struct.pack("<Q", 2**64 - 1), "announces a header of 18,446,744,073,709,551,615 bytes"),
        (struct.pack("<Q", 500) + b"{}", "not a safetensors file"),
        (header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "not a safetensors file"),
        (header({"x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**63]}}), "not a safetensors file"),
        (header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**15]}}), "not a safetensors file"),
        (header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), r"unexpected \['x'\]"),
        (b"\x80\x04\x95" + b"pickled, perhaps", "announces a header of"),
        (b"\0" * 3_000_000, r"has 3,000,000 bytes; the weights of this model have at most 1,9"),
    ],
)
def test_what_is_not_the_models_weights_is_refused(run, content, message):
    (run / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        verify(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.2.gain"), r"missing \['layers.2.gain'\], unexpected \[\]"),
        (lambda s: s.update({"../x": torch.ones(1)}), r"missing \[\], unexpected \['../x'\]"),
        (
            lambda s: s.update({"head.fc.bias": torch.ones(5)}),
            r"head.fc.bias has shape \(5,\) and type F32; expected \(4",
        ),
        (lambda s: s.update({"head.fc.bias": torch.ones(4).long()}), r"head.fc.bias has shape \(4,\) and type I64"),
        (lambda s: s.update({"head.fc.bias": torch.ones(4).double()}), r"type F64; expected \(4,\) and one of F32"),
        (lambda s: s["layers.0.weight"][0].fill_(float("nan")), r"layers.0.weight has values that are NaN or infinite"),
        (lambda s: s["head.fc.weight"][0].fill_(-float("inf")), r"head.fc.weight has values that are NaN or infinite"),
    ],
)
def test_hostile_tensors_are_refused(run, change, message):
    (run / "model.safetensors").write_bytes(changed_weights(run, change))
    for check in (verify, load, load_run):
        with pytest.raises(ValueError, match=message):
            check(run)


def test_half_precision_and_large_values_pass(run):
    """Values whose sum overflows are finite all the same."""
    state = {name: tensor.half() for name, tensor in load_file(run / "model.safetensors").items()}
    state["head.fc.weight"].fill_(60_000)
    save_file(state, run / "model.safetensors")
    assert load(run).head.fc.weight[0, 0] == torch.tensor(60_000.0).half()


@pytest.mark.parametrize("pool", ["fast", "fastmax", "catavgmax"])
def test_every_kind_of_pooling_of_timm_passes(pool, tmp_path):
    model = timm.create_model("ep_vgg5_025", num_classes=3, global_pool=pool).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path)(images), model(images))


def test_the_commands_read_runs_through_the_checks(run):
    """Pickles beside no safetensors, and facts of another model, get a message; what they hold is not run."""
    (run / "config.json").write_bytes(changed_config(run, architecture="resnet18"))
    with pytest.raises(ValueError, match="resnet18"):
        Predict(run).run()
    make_facts(architecture="test_resnet").save(run / "results.json")
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        Validate(run).run()
    marker = run / "exploded"
    (run / "pytorch_model.bin").write_bytes(pickled_weights(run, marker))
    (run / "model.safetensors").unlink()
    for architecture in ("test_resnet", "ep_vgg5_025"):
        make_facts(architecture=architecture).save(run / "results.json")
        (run / "config.json").write_bytes(changed_config(run, architecture=architecture))
        with pytest.raises(FileNotFoundError, match=r"only safetensors are read. Of \['pytorch_model.bin'\]"):
            load_run(run)
    assert not marker.exists()


def test_facts_and_configuration_name_one_model(run):
    make_facts(architecture="test_vit").save(run / "results.json")
    with pytest.raises(ValueError, match=r"names the architecture 'ep_vgg5_025', not 'test_vit'"):
        load_run(run)


def test_the_bomb_of_these_tests_works(tmp_path):
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()


# Fuzz

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["ep_vgg9", "ep_vgg19", "max", "ep", "bptt", "backprop", "zero", "bicubic", "resnet18"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=6,
)
KEYS = [
    *("architecture", "num_classes", "num_features", "global_pool", "label_names", "label_descriptions"),
    *("model_args", "pretrained_cfg"),
    *(("model_args", key) for key in ("in_chans", "num_classes", "drop_rate", "global_pool", "device", "dtype")),
    ("model_args", "architecture"),
    *(("model_args", key) for key in ("feedback", "free_sweeps", "beta", "pool", "gradient", "tol", "update")),
    *(("pretrained_cfg", key) for key in ("input_size", "mean", "std", "num_classes", "label_names", "url", "file")),
    *(("pretrained_cfg", key) for key in ("custom_load", "crop_pct", "interpolation", "pool_size", "classifier")),
]


LAYERS = st.lists(st.integers(-1, 40) | st.sampled_from(["M", "M", "N"]), max_size=6)


@fuzz
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), JSON | LAYERS), min_size=1, max_size=3), drop=st.booleans())
def test_fuzz_configurations(good, tmp_path_factory, changes, drop):
    """Refused with a ValueError, or accepted: then timm makes of it just the model that was announced."""
    config = json.loads((good / "config.json").read_text())
    for key, value in changes:
        path = (key,) if isinstance(key, str) else key
        home = config if len(path) == 1 else config.get(path[0])
        if isinstance(home, dict):
            if drop:
                home.pop(path[-1], None)
            else:
                home[path[-1]] = value
    folder = tmp_path_factory.getbasetemp() / "fuzz_config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    started = time.monotonic()
    try:
        model = verify_config(folder / "config.json")
    except ValueError:
        return
    finally:
        assert time.monotonic() - started < 30, "a configuration keeps the check busy"
    assert isinstance(model, EpVgg)
    kept = read_config(folder / "config.json")
    args = {name: value for name, value in kept["model_args"].items() if name in SETTING_NAMES}
    assert asdict(model.settings) == {**asdict(model.settings), **args}
    made = timm.create_model(f"local-dir:{folder}", pretrained=False, device="meta")
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert model.num_classes == kept["num_classes"]
    assert model.in_chans == kept["model_args"].get("in_chans", kept["pretrained_cfg"].get("input_size", [3])[0])


@fuzz
@given(
    text=st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | JSON.map(lambda v: json.dumps(v).encode())
)
def test_fuzz_what_is_no_configuration(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        verify_config(path)


TINY = EpVgg((2, "M", 3), num_classes=2, in_chans=1)
TINY_BYTES = save(TINY.state_dict())
TINY_LENGTH = struct.unpack("<Q", TINY_BYTES[:8])[0]
TINY_HEADER = json.loads(TINY_BYTES[8 : 8 + TINY_LENGTH])
FIELD = st.sampled_from(["dtype", "shape", "data_offsets"])
WRONG = st.one_of(
    JSON,
    st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "f32"]),
    st.lists(st.integers(-3, 30) | st.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63)]), max_size=4),
)


def check_weights(path: Path, content: bytes) -> None:
    """Refused with a ValueError, or accepted: then safetensors loads just the tensors of the model, and finite."""
    path.write_bytes(content)
    try:
        verify_weights(path, TINY)
    except ValueError:
        return
    loaded = load_file(path)
    twin = copy.deepcopy(TINY)
    twin.load_state_dict(loaded, strict=True)
    assert all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in loaded.values())


@fuzz
@given(
    changes=st.lists(st.tuples(st.sampled_from([*TINY_HEADER, "x", "__metadata__"]), FIELD, WRONG), max_size=3),
    renamed=st.none() | st.tuples(st.sampled_from(list(TINY_HEADER)), st.text(max_size=20)),
    length=st.none() | st.none() | st.integers(0, 2**64 - 1) | st.integers(TINY_LENGTH - 9, TINY_LENGTH + 9),
)
def test_fuzz_headers(tmp_path_factory, changes, renamed, length):
    content = copy.deepcopy(TINY_HEADER)
    for name, field, value in changes:
        entry = content.setdefault(name, {"dtype": "F32", "shape": [], "data_offsets": [0, 4]})
        entry[field] = value
    if renamed and renamed[0] in content:
        content[renamed[1]] = content.pop(renamed[0])
    text = json.dumps(content).encode()
    whole = struct.pack("<Q", len(text) if length is None else length) + text + TINY_BYTES[8 + TINY_LENGTH :]
    check_weights(tmp_path_factory.getbasetemp() / "fuzz.safetensors", whole)


@fuzz
@given(
    edits=st.lists(st.tuples(st.integers(0, len(TINY_BYTES) - 1), st.integers(0, 255)), max_size=8),
    cut=st.none() | st.integers(0, len(TINY_BYTES)),
    tail=st.binary(max_size=16),
)
def test_fuzz_bytes(tmp_path_factory, edits, cut, tail):
    content = bytearray(TINY_BYTES)
    for place, value in edits:
        content[place] = value
    check_weights(tmp_path_factory.getbasetemp() / "fuzz.safetensors", bytes(content[:cut]) + tail)


def test_the_fuzzed_file_is_accepted_unchanged(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(TINY_BYTES)
    verify_weights(tmp_path / "x.safetensors", TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": float("nan")}, r"conv1\.0\.weight has values that are NaN"),
        ({"label": "\x1b[2Jb"}, "label_names is .*expected a list of plain texts"),
        ({"legacy": {"labels": ["\x1b[31mred", "b"]}}, "label_names is .*expected a list of plain texts"),
        ({"legacy": {"labels": ["a"]}}, "expected a list of plain texts, one for each of 2 classes"),
        ({"args": {"num_classes": 5}}, "num_classes is 2, but 5 in model_args"),
        ({"args": {"pretrained_strict": False}}, r"model_args has \['pretrained_strict'\]"),
        ({}, None),
    ],
)
def test_other_models_of_timm_are_checked_for_what_they_would_print(tmp_path, change, message):
    model = timm.create_model("test_resnet", num_classes=2)
    with torch.no_grad():
        model.conv1[0].weight[0, 0] = change.get("weight", 1.0)
    config = {"label_names": ["a", change.get("label", "b")], "num_classes": 2}
    save_for_hf(model, tmp_path, model_config=config, safe_serialization=True)
    written = json.loads((tmp_path / "config.json").read_text())
    if "args" in change:
        written["model_args"] = change["args"]
    if "legacy" in change:  # as timm wrote them once
        told = {name: written[name] for name in ("architecture", "num_classes")}
        written = {**written["pretrained_cfg"], **told, **change["legacy"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    if message is None:
        load(tmp_path, "test_resnet")
    else:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, "test_resnet")
