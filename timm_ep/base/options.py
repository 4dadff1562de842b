"""The options of a command, held to their declared types in Python as on the command line."""

import re
from argparse import ArgumentError
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentParser

__all__ = ["Options"]


@dataclass
class Options:
    """What has the options of a command as its fields, held to their types by what reads them from the command line and
    from YAML: choices are those that are listed, paths and numbers may be given as text.

    Raises:
        ValueError: a value of another type, or no choice of its option.
    """

    def __post_init__(self) -> None:
        hints, parser = get_type_hints(type(self)), ArgumentParser(exit_on_error=False)
        values = {option.name: _plain(getattr(self, option.name)) for option in fields(self) if option.init}
        read = {}
        for name, value in values.items():
            either = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else [hints[name]]
            kinds = {get_origin(kind) or kind for kind in either}
            if value is None and type(None) not in kinds:
                raise ValueError(f"{type(self).__name__}: option {name} is None; it needs a value.")
            if isinstance(value, str) and Path in kinds:
                values[name] = Path(value)
            elif type(value) not in kinds or isinstance(value, list):  # else it stays: text may look like a number
                parser.add_argument(f"--{name}", type=hints[name])
                read[name] = value
        try:
            values.update(vars(parser.parse_object(read, defaults=False)))
        except ArgumentError as error:
            message = " ".join(str(error).removeprefix("Parser key ").split())
            message = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", message)
            raise ValueError(f"{type(self).__name__}: option {message}") from None
        for name, value in values.items():
            setattr(self, name, value)


def _plain(value: Any) -> Any:
    """Tuples as lists, paths as text (some options are of either), and what NumPy and torch have as Python has it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, Path | torch.device):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value
