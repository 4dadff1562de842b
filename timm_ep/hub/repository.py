"""What a model's repository holds, and the checks it must pass before anything in it is used.

A repository is a folder: on the Hub, in `model_cards/`, or the output of training. Its configuration is data, and is
held to a list of what it may say; its weights are safetensors, and must be exactly the tensors of the model it names.
Nothing in it is ever unpickled or run.
"""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor, nn

from timm_ep.base.text import is_plain_text
from timm_ep.core.settings import SETTING_NAMES
from timm_ep.models import EpVgg
from timm_ep.models.named import is_ours

__all__ = [
    "CONFIG_NAME",
    "PICKLES",
    "TEXT_LIMIT",
    "WEIGHTS_NAME",
    "load",
    "load_checkpoint",
    "named_architecture",
    "read_config",
    "tensor_shapes",
    "verify",
    "verify_config",
    "verify_weights",
    "weights_limit",
]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TEXT_LIMIT = 4_000_000  # bytes of config.json, enough for 100,000 class names

_HEADER_LIMIT = 1_000_000  # bytes; the deepest net needs 10,000
PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt", ".tar")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Accepts = Callable[[Any], bool]


def _is_int(low: int, high: int) -> Accepts:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(low: float, high: float) -> Accepts:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_list(item: Accepts, low: int, high: int) -> Accepts:
    return lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(item, value))


def _is_text(value: Any) -> bool:
    return is_plain_text(value) and len(value) <= 10_000


def _is_one_of(*choices: Any) -> Accepts:
    # Not `value in choices`: True == 1 and a list cannot be hashed.
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)


def _or_null(accepts: Accepts) -> Accepts:
    return lambda value: value is None or accepts(value)


def _is_plain(value: Any) -> bool:
    """A value whose kind alone is checked here; the model checks the rest."""
    return value is None or isinstance(value, bool) or _is_text(value) or _is_number(-1e9, 1e9)(value)


_CLASSES = _is_int(0, 100_000)
_IN_CHANS = _is_int(1, 1024)
_PADDING = _is_int(0, 64)
_IMAGE = _is_list(_is_int(1, 16_384), 3, 3)
_NAMES = _is_list(_is_text, 0, 100_000)
_TEXTS = _or_null(lambda value: _is_text(value) or _NAMES(value))
_DESCRIPTIONS = _or_null(lambda value: isinstance(value, dict) and all(map(_is_text, (*value, *value.values()))))
_LAYERS = _is_list(lambda value: value == "M" or _is_int(1, 8192)(value), 1, 64)
_POOL = _is_one_of(*(f"{fast}{kind}" for fast in ("", "fast") for kind in ("avg", "max", "avgmax", "catavgmax", "")))

_NOT_FOR_A_FILE = {"self", "device", "dtype", "settings"}
# Sweeps are bounded so that a configuration cannot make a model hang; the literature's nets settle in a few hundred.
_MODEL_ARGS: dict[str, Accepts] = {
    **{
        name: lambda value: _is_plain(value) or _is_list(_is_plain, 0, 1000)(value)
        for name in (*inspect.signature(EpVgg.__init__).parameters, *SETTING_NAMES)
        if name not in _NOT_FOR_A_FILE
    },
    "architecture": _LAYERS,
    "padding": lambda value: _PADDING(value) or _is_list(_PADDING, 1, 64)(value),
    "unit": _or_null(_is_number(1e-6, 1e6)),
    "state_bits": _is_int(0, 64),
    "weight_bits": _is_int(0, 64),
    "free_sweeps": _is_int(0, 10_000),
    "nudged_sweeps": _is_int(1, 10_000),
    "num_classes": _CLASSES,
    "in_chans": _IN_CHANS,
    "global_pool": _POOL,
    "drop_rate": _is_number(0, 1),
}
# Not among them: url, file, state_dict, hf_hub_id, source: where weights are is not for a repository to say.
_PRETRAINED_CFG: dict[str, Accepts] = {
    "architecture": _is_text,
    "tag": _is_text,
    "custom_load": _is_one_of(False),
    "input_size": _IMAGE,
    "test_input_size": _IMAGE,
    "min_input_size": _IMAGE,
    "fixed_input_size": _is_one_of(False),
    "interpolation": _is_one_of("bilinear", "bicubic", "nearest", "lanczos", "hamming", "box", "random"),
    "crop_pct": _is_number(0.01, 10),
    "test_crop_pct": _is_number(0.01, 10),
    "crop_mode": _is_one_of("center", "squash", "border"),
    "mean": _is_list(_is_number(-1e6, 1e6), 1, 1024),
    "std": _is_list(_is_number(1e-6, 1e6), 1, 1024),
    "num_classes": _CLASSES,
    "label_names": _or_null(_NAMES),
    "label_descriptions": _DESCRIPTIONS,
    "pool_size": _or_null(_is_list(_is_int(1, 16_384), 2, 2)),
    "test_pool_size": _or_null(_is_list(_is_int(1, 16_384), 2, 2)),
    "first_conv": _is_one_of("layers.0"),
    "classifier": _is_one_of("head.fc"),
    "license": _or_null(_is_text),
    "description": _or_null(_is_text),
    "origin_url": _or_null(_is_text),
    "paper_name": _or_null(_is_text),
    "paper_ids": _TEXTS,
    "notes": _TEXTS,
}
_CONFIG: dict[str, Accepts] = {
    "architecture": _is_text,
    "num_classes": _CLASSES,
    "num_features": _is_int(1, 1_000_000),
    "global_pool": _POOL,
    "label_names": _or_null(_NAMES),
    "label_descriptions": _DESCRIPTIONS,
    "model_args": lambda value: isinstance(value, dict),
    "pretrained_cfg": lambda value: isinstance(value, dict),
}
_REQUIRED = {"architecture", "num_classes", "model_args", "pretrained_cfg"}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of one of this package's models, reduced to what timm reads of it.

    Every value is of the right kind and size; what other values would do together is for `verify_config`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a configuration; the message names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as training or "
            "timm.models.save_for_hf writes it."
        )
    config = _read_object(path)
    config = {key: config[key] for key in _CONFIG if key in config}
    if missing := sorted(_REQUIRED - config.keys()):
        raise ValueError(f"{path} lacks {missing}; expected a configuration that timm.models.save_for_hf writes.")
    _check(path, "", config, _CONFIG)
    if not is_ours(config["architecture"]):
        raise ValueError(
            f"{path}: architecture {config['architecture']!r:.80} is not of this package; those that are: "
            "timm.list_models('ep_vgg*')."
        )
    _check(path, "model_args.", config["model_args"], _MODEL_ARGS)
    _check(path, "pretrained_cfg.", config["pretrained_cfg"], _PRETRAINED_CFG)
    return config


def _read_object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > TEXT_LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a configuration has at most {TEXT_LIMIT:,}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected an object that timm reads.")
    return config


def _check(path: Path, prefix: str, values: dict[str, Any], accepted: dict[str, Accepts]) -> None:
    for key, value in values.items():
        if key not in accepted:
            raise ValueError(f"{path}: {prefix + key!r:.80} is not accepted; known are {', '.join(sorted(accepted))}.")
        if not accepted[key](value):
            raise ValueError(f"{path}: {prefix}{key} is {value!r:.200}, of a kind or size that is not accepted.")


def verify_config(path: str | os.PathLike[str]) -> nn.Module:
    """The model that a configuration describes, as timm makes it, without weights (on the meta device).

    Args:
        path: of config.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a configuration of this package's models.
    """
    path, config = Path(path), read_config(path)
    args, cfg = config["model_args"], config["pretrained_cfg"]
    for key, value in (("model_args", args), ("pretrained_cfg", cfg)):
        if value.get("num_classes", config["num_classes"]) != config["num_classes"]:
            raise ValueError(f"{path}: num_classes is {config['num_classes']}, but {value['num_classes']} in {key}.")
    labels = config.get("label_names") or cfg.get("label_names")
    if labels and len(labels) != config["num_classes"]:
        raise ValueError(f"{path}: {len(labels)} label names for {config['num_classes']} classes.")
    try:
        model = timm.create_model(f"local-dir:{path.parent}", pretrained=False, device="meta")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: model_args: {error}") from error
    for key in ("mean", "std"):
        if len(cfg.get(key, [0])) not in (1, 3, model.in_chans):  # timm averages three values for other channels
            raise ValueError(f"{path}: {key} has {len(cfg[key])} values for {model.in_chans} channels.")
    return model


def verify_weights(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Check that a safetensors file holds the tensors of `model`, all of them, no others, and finite.

    Args:
        path: of the file.
        model: from `verify_config`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything else than those tensors, in float32, bfloat16 or float16.
    """
    path = Path(path)
    _check_header(path)
    size, limit = path.stat().st_size, weights_limit(model)
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes; the weights of this model have at most {limit:,}.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            found = {name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()}
            names = clean_state_dict({name: name for name in found})  # as timm will read them: `module.` and so on
            found = clean_state_dict(found)
            _check_tensors(path, model, found, lambda name: file.get_tensor(names[name]))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def tensor_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file, without reading any; names without timm's wrappers' prefixes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no safetensors.
    """
    path = Path(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return clean_state_dict(shapes)


def _check_header(path: Path) -> None:
    if not path.is_file():
        pickles = sorted(file.name for file in path.parent.glob("*") if file.suffix in PICKLES)
        found = f" Of {pickles}, which may run code when read, none is opened." if pickles else ""
        raise FileNotFoundError(f"{path} does not exist; only safetensors are read.{found}")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _HEADER_LIMIT:
        raise ValueError(f"{path} announces a header of {size:,} bytes; a model's is well below {_HEADER_LIMIT:,}.")


def weights_limit(model: nn.Module) -> int:
    """Bytes that the weights file of `model` has at most."""
    return sum(tensor.numel() * 4 for tensor in model.state_dict().values()) + _HEADER_LIMIT + 8


def _check_tensors(
    path: Path, model: nn.Module, found: Mapping[str, tuple[tuple[int, ...], Any]], read: Callable[[str], Tensor]
) -> None:
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{path} does not hold this model: missing {missing!s:.200}, unexpected {extra!s:.200}.")
    for name, tensor in expected.items():
        shape, dtype = found[name]
        if shape != tuple(tensor.shape) or dtype not in (*_DTYPES, *_DTYPES.values()):
            raise ValueError(
                f"{path}: {name} has shape {shape} and type {dtype}; expected {tuple(tensor.shape)} and one of "
                f"{', '.join(_DTYPES)}."
            )
        if not read(name).isfinite().all():
            raise ValueError(f"{path}: {name} has values that are NaN or infinite; the model would answer nothing.")


def verify(folder: str | os.PathLike[str]) -> nn.Module:
    """Check a whole repository: `verify_config`, then `verify_weights`; returns the model without its weights."""
    model = verify_config(Path(folder) / CONFIG_NAME)
    verify_weights(Path(folder) / WEIGHTS_NAME, model)
    return model


def named_architecture(folder: str | os.PathLike[str]) -> str | None:
    """The architecture that a folder's config.json names; None for this package's, or where it is to be found wrong."""
    try:
        name = _read_object(Path(folder) / CONFIG_NAME)["architecture"]
    except (OSError, ValueError, LookupError):
        return None
    return name if isinstance(name, str) and timm.is_model(name) and not is_ours(name) else None


def load(folder: str | os.PathLike[str], architecture: str | None = None) -> nn.Module:
    """The model of a local repository, in eval mode and checked before it is read.

    Args:
        folder: with config.json and model.safetensors.
        architecture: what it is to be. Another model of timm than this package's must be asked for by name; timm itself
            compares its tensors, and here the kind of its weights file, their values and the names of its classes are
            checked.

    Raises:
        FileNotFoundError: no configuration, or no safetensors.
        ValueError: a check that fails; the message names the file and what is wrong.
    """
    folder = Path(folder)
    ours = architecture is None or is_ours(architecture)
    if ours:
        verify(folder)
    else:
        _check_header(folder / WEIGHTS_NAME)
        _check_other(folder)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if not ours:
        if broken := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
            raise ValueError(
                f"{folder}: {broken[0]} has values that are NaN or infinite; the model would answer nothing."
            )
        names = model.pretrained_cfg.get("label_names")
        if names is not None and not (_NAMES(names) and len(names) == model.num_classes):
            raise ValueError(
                f"{folder / CONFIG_NAME}: label_names is {names!r:.200}; expected a list of plain texts, one for each "
                f"of {model.num_classes} classes."
            )
    if architecture is not None and model.pretrained_cfg["architecture"] != architecture:
        raise ValueError(
            f"{folder / CONFIG_NAME} names the architecture {model.pretrained_cfg['architecture']!r}, not "
            f"{architecture!r} as the facts of the run do."
        )
    return model


def _check_other(folder: Path) -> None:
    """Of another model of timm: what timm would make another model of in silence."""
    path = folder / CONFIG_NAME
    config = _read_object(path)
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise ValueError(f"{path}: model_args is a {type(args).__name__}; expected an object.")
    if told := sorted(name for name in args if name.startswith("pretrained")):
        raise ValueError(f"{path}: model_args has {told}; where weights are, and how many of them, it is not to say.")
    if (classes := args.get("num_classes", config.get("num_classes"))) != config.get("num_classes"):
        raise ValueError(f"{path}: num_classes is {config.get('num_classes')}, but {classes} in model_args.")


def load_checkpoint(path: str | os.PathLike[str]) -> nn.Module:
    """The model of a checkpoint file beside its config.json, in the dtype of the file.

    Args:
        path: safetensors, or a checkpoint of PyTorch, read with `weights_only=True`; of a training checkpoint the
            averaged weights are taken if it has them (`timm.models.load_state_dict`).

    Raises:
        FileNotFoundError: no such file, or no config.json beside it.
        ValueError: a check that fails, or a checkpoint that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the folder of a run, or a checkpoint file.")
    model = verify_config(path.parent / CONFIG_NAME)
    if path.suffix == ".safetensors":
        verify_weights(path, model)
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (RuntimeError, ValueError, AttributeError, EOFError, LookupError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be read without running code: {error}") from error
    if not all(isinstance(v, Tensor) and v.layout == torch.strided and not v.is_meta for v in state.values()):
        raise ValueError(f"{path} holds more than tensors of numbers; expected the state_dict of a model.")
    _check_tensors(path, model, {k: (tuple(v.shape), v.dtype) for k, v in state.items()}, state.__getitem__)
    model = timm.create_model(f"local-dir:{path.parent}", pretrained=False)
    dtype = state[next(iter(state))].dtype
    for tensor in state.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    model.to(dtype).load_state_dict(state)
    return model.eval()
