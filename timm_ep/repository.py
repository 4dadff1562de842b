"""What a model's repository holds, and the checks a foreign one must pass before anything in it is used.

A repository is a folder: on the Hub, in `model_cards/`, or the output of training. Its configuration is data, and is held
to a list of what it may say; its weights are safetensors, and must be exactly the tensors of the model it names. Nothing
in it is ever unpickled or run.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import nn

from timm_ep.dynamics import SETTING_NAMES

__all__ = ["CONFIG_NAME", "TEXT_LIMIT", "WEIGHTS_NAME", "read_config", "verify", "verify_config", "verify_weights"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TEXT_LIMIT = 4_000_000  # bytes of config.json, enough for 100,000 class names

_HEADER_LIMIT = 1_000_000  # bytes; the deepest net needs 10,000
_POOLS = ("avg", "max", "avgmax", "catavgmax", "")
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "hamming", "box", "random")
_DTYPES = ("F32", "BF16", "F16")


def _is_int(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_list(item: Callable[[Any], bool], low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(item, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10_000 and value.isprintable()


def _is_one_of(*choices: Any) -> Callable[[Any], bool]:
    # Not `value in choices`: True == 1 and a list cannot be hashed.
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)


def _or_null(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


_CLASSES = _is_int(0, 100_000)
_IN_CHANS = _is_int(1, 1024)
_IMAGE = _is_list(_is_int(1, 16_384), 3, 3)
_NAMES = _is_list(_is_text, 0, 100_000)
_TEXT_OR_TEXTS = _or_null(lambda value: _is_text(value) or _NAMES(value))

# Sweeps are bounded so that a configuration cannot make a model hang; the literature's nets settle in a few hundred.
_MODEL_ARGS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(SETTING_NAMES, lambda value: isinstance(value, str) or _is_number(-1e9, 1e9)(value)),
    "free_sweeps": _is_int(0, 100_000),
    "nudged_sweeps": _is_int(1, 100_000),
    "num_classes": _CLASSES,
    "in_chans": _IN_CHANS,
    "global_pool": _is_one_of(*_POOLS),
    "drop_rate": _is_number(0, 1),
}
# Not among them: url, file, state_dict, hf_hub_id, source: where weights are is not for a repository to say.
_PRETRAINED_CFG: dict[str, Callable[[Any], bool]] = {
    "architecture": _is_text,
    "tag": _is_text,
    "custom_load": _is_one_of(False),
    "input_size": _IMAGE,
    "test_input_size": _IMAGE,
    "min_input_size": _IMAGE,
    "fixed_input_size": _is_one_of(False),
    "interpolation": _is_one_of(*_INTERPOLATIONS),
    "crop_pct": _is_number(0.01, 10),
    "test_crop_pct": _is_number(0.01, 10),
    "crop_mode": _is_one_of("center", "squash", "border"),
    "mean": _is_list(_is_number(-1e6, 1e6), 1, 1024),
    "std": _is_list(_is_number(1e-6, 1e6), 1, 1024),
    "num_classes": _CLASSES,
    "label_names": _or_null(_NAMES),
    "label_descriptions": _or_null(lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))),
    "pool_size": _or_null(_is_list(_is_int(1, 16_384), 2, 2)),
    "test_pool_size": _or_null(_is_list(_is_int(1, 16_384), 2, 2)),
    "first_conv": _is_one_of("layers.0"),
    "classifier": _is_one_of("head.fc"),
    "license": _or_null(_is_text),
    "description": _or_null(_is_text),
    "origin_url": _or_null(_is_text),
    "paper_name": _or_null(_is_text),
    "paper_ids": _TEXT_OR_TEXTS,
    "notes": _TEXT_OR_TEXTS,
}
_CONFIG: dict[str, Callable[[Any], bool]] = {
    "architecture": _is_text,
    "num_classes": _CLASSES,
    "num_features": _is_int(1, 1_000_000),
    "global_pool": _is_one_of(*_POOLS),
    "label_names": _or_null(_NAMES),
    "label_descriptions": _PRETRAINED_CFG["label_descriptions"],
    "model_args": lambda value: isinstance(value, dict),
    "pretrained_cfg": lambda value: isinstance(value, dict),
}
_REQUIRED = {"architecture", "num_classes", "model_args", "pretrained_cfg"}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json, reduced to what timm reads of it, every value of the right kind and size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a configuration; the message names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as training writes it."
        )
    if path.stat().st_size > TEXT_LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a configuration has at most {TEXT_LIMIT:,}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected an object that timm reads.")
    config = {key: config[key] for key in _CONFIG if key in config}
    if missing := sorted(_REQUIRED - config.keys()):
        raise ValueError(f"{path} lacks {missing}; expected a configuration that timm.models.save_for_hf writes.")
    _check(path, "", config, _CONFIG)
    _check(path, "model_args.", config["model_args"], _MODEL_ARGS)
    _check(path, "pretrained_cfg.", config["pretrained_cfg"], _PRETRAINED_CFG)
    return config


def _check(path: Path, prefix: str, values: dict[str, Any], accepted: dict[str, Callable[[Any], bool]]) -> None:
    for key, value in values.items():
        if key not in accepted:
            raise ValueError(f"{path}: {prefix + key!r:.80} is not accepted; known are {', '.join(sorted(accepted))}.")
        if not accepted[key](value):
            raise ValueError(f"{path}: {prefix}{key} is {value!r:.200}, of a kind or size that is not accepted.")


def verify_config(path: str | os.PathLike[str]) -> nn.Module:
    """The model that a configuration describes, without weights (on the meta device).

    Args:
        path: of config.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a configuration of this package's models.
    """
    config = read_config(path)
    name, args, cfg = config["architecture"], config["model_args"], config["pretrained_cfg"]
    if name not in timm.list_models("ep_vgg*"):
        raise ValueError(f"{path}: architecture {name!r:.80} is not of this package; run timm.list_models('ep_vgg*').")
    for key, value in (("model_args", args), ("pretrained_cfg", cfg)):
        if value.get("num_classes", config["num_classes"]) != config["num_classes"]:
            raise ValueError(f"{path}: num_classes is {config['num_classes']}, but {value['num_classes']} in {key}.")
    labels = config.get("label_names") or cfg.get("label_names")
    if labels and len(labels) != config["num_classes"]:
        raise ValueError(f"{path}: {len(labels)} label names for {config['num_classes']} classes.")
    channels = args.get("in_chans", 3)
    for key in ("mean", "std"):
        if len(cfg.get(key, [0])) not in (1, channels):
            raise ValueError(f"{path}: {key} has {len(cfg[key])} values for {channels} channels.")
    if "input_size" in cfg and cfg["input_size"][0] != channels:
        raise ValueError(f"{path}: input_size is {cfg['input_size']} for {channels} channels.")
    try:
        return timm.create_model(name, device="meta", **{"num_classes": config["num_classes"], **args})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: model_args: {error}") from error


def verify_weights(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Check that a safetensors file holds the tensors of `model`, all of them, no others, and finite.

    Args:
        path: of model.safetensors.
        model: from `verify_config`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything else than those tensors, in float32, bfloat16 or float16.
    """
    path = Path(path)
    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pth", ".pt", ".pkl", ".ckpt"))
        found = f" Of {pickles}, which may run code when read, none is opened." if pickles else ""
        raise FileNotFoundError(f"{path} does not exist; only safetensors are read.{found}")
    size, limit = path.stat().st_size, weights_limit(model)
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes; the weights of this model have at most {limit:,}.")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > _HEADER_LIMIT:
        raise ValueError(
            f"{path} announces a header of {header:,} bytes; this model's is well below {_HEADER_LIMIT:,}."
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            _check_tensors(path, tensors, model)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def weights_limit(model: nn.Module) -> int:
    """Bytes that the weights file of `model` has at most."""
    return sum(tensor.numel() * 4 for tensor in model.state_dict().values()) + _HEADER_LIMIT + 8


def _check_tensors(path: Path, tensors: Any, model: nn.Module) -> None:
    expected, found = model.state_dict(), set(tensors.keys())
    missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or extra:
        raise ValueError(f"{path} does not hold this model: missing {missing!s:.200}, unexpected {extra!s:.200}.")
    for name, tensor in expected.items():
        entry = tensors.get_slice(name)
        shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
        if shape != tuple(tensor.shape) or dtype not in _DTYPES:
            raise ValueError(
                f"{path}: {name} has shape {shape} and type {dtype}; expected {tuple(tensor.shape)} and one of {_DTYPES}."
            )
        values = tensors.get_tensor(name)
        if not math.isfinite(values.float().sum()) and not values.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are NaN or infinite; the model would answer nothing.")


def verify(folder: str | os.PathLike[str]) -> nn.Module:
    """Check a whole repository: `verify_config`, then `verify_weights`; returns the model without its weights."""
    model = verify_config(Path(folder) / CONFIG_NAME)
    verify_weights(Path(folder) / WEIGHTS_NAME, model)
    return model
