"""The options of a command, held to their declared types in Python as on the command line."""

import re
from argparse import ArgumentError
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

__all__ = ["Options"]


@dataclass
class Options:
    """What has the options of a command as its fields, held to their types by what reads them from the command line and
    from YAML: choices are those that are listed, and paths may be given as strings.

    Raises:
        ValueError: a value of another type, or no choice of its option.
    """

    def __post_init__(self) -> None:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(type(self), as_group=False)
        values = {option.name: _plain(getattr(self, option.name)) for option in fields(self)}
        try:
            parsed = parser.parse_object(values, defaults=False)
        except ArgumentError as error:
            message = " ".join(str(error).removeprefix("Parser key ").split())
            message = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", message)
            raise ValueError(f"{type(self).__name__}: option {message}") from None
        for name in values:
            setattr(self, name, parsed[name])


def _plain(value: Any) -> Any:
    """A path may also be given for what is declared as text, such as a teacher's folder."""
    return str(value) if isinstance(value, Path) else value
