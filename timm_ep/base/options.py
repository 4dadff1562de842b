"""The options of a command, held to their declared types in Python as on the command line."""

import os
import re
from argparse import ArgumentError
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentParser

__all__ = ["Options"]

_VARIABLE = re.compile(r"\$(\w|\{\w+\})")


@dataclass
class Options:
    """What has the options of a command as its fields, held to their types by what reads them from the command line and
    from YAML: choices are those that are listed, paths and numbers may be given as text. In paths `~` and variables of
    the environment are put in; the shell does so only for words that begin with them.

    Raises:
        ValueError: a value of another type, or no choice of its option; a variable that is not set, or a user that is
            not known.
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
            setattr(self, name, _found(value))

    def at_least(self, **least: float) -> None:
        """Refuse options that are given and below these.

        Raises:
            ValueError: the first that is.
        """
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name}={value} is too small; it must be at least {bound}.")


def _found(value: Any) -> Any:
    if isinstance(value, list):
        return [_found(item) for item in value]
    if isinstance(value, Path):
        return Path(_expanded(str(value)))
    if isinstance(value, str):  # which may be a path too, as of a teacher
        kind = next(kind for kind in ("local-dir:", "hfds/", "") if value.startswith(kind))
        path = value.removeprefix(kind)
        return kind + _expanded(path) if path.startswith(("~", "$")) else value
    return value


def _expanded(path: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(path))
    if (expanded.startswith("~") or _VARIABLE.search(expanded)) and not os.path.exists(expanded):
        raise ValueError(f"{path} has a user or a variable of the environment that is not known here.")
    return expanded


def _plain(value: Any) -> Any:
    """Tuples as lists, paths as text (some options are of either), and what NumPy and torch have as Python has it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, Path | torch.device):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value
