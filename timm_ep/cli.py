"""`timm-ep COMMAND …`: each command is a dataclass whose fields are its options and whose `run` does the work."""

import dataclasses
import sys
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser

from timm_ep.redaction import holds_secret, redacted

# Imported only when asked for: help and errors are to be quick.
COMMANDS = {
    "train": ("timm_ep.trainer", "Trainer"),
    "validate": ("timm_ep.evaluate", "Validate"),
    "predict": ("timm_ep.evaluate", "Predict"),
    "plot": ("timm_ep.plots", "Plot"),
    "study": ("timm_ep.study", "Study"),
    "gradcheck": ("timm_ep.gradcheck", "Gradcheck"),
    "cost": ("timm_ep.cost", "Cost"),
    "card": ("timm_ep.cards", "Card"),
    "publish": ("timm_ep.hub", "Publish"),
    "pull": ("timm_ep.hub", "Pull"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and a one-line message on a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        usage = f"usage: timm-ep {{{','.join(COMMANDS)}}} …\nOptions of a command: timm-ep COMMAND --help\n"
        helped = words[:1] in ([], ["-h"], ["--help"])
        (sys.stdout if helped else sys.stderr).write(usage if helped else f"unknown command {words[0]!r}\n{usage}")
        sys.exit(0 if helped else 2)
    name, *options = words
    if any(map(holds_secret, options)):
        message = "an option holds an access token or a password, which would end in logs and in the shell's history"
        sys.stderr.write(f"timm-ep {name}: error: {message}; log in with `hf auth login` or set HF_TOKEN.\n")
        sys.exit(2)
    module, command = COMMANDS[name]
    kind = getattr(import_module(module), command)
    parser = ArgumentParser(prog=f"timm-ep {name}")
    parser.add_argument("--config", action="config", help="YAML file with any of these options; others override it")
    parser.add_class_arguments(kind, as_group=False, as_positional=True)
    flags = {option.name for option in dataclasses.fields(kind) if option.type is bool}
    config = parser.parse_args(_with_values([_underscored(option) for option in options], flags))
    del config["config"]
    try:
        kind(**vars(parser.instantiate(config))).run()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        parser.exit(2, f"timm-ep {name}: error: {redacted(str(error))}\n")


def _underscored(option: str) -> str:
    """`--batch-size` is `--batch_size`; values keep their hyphens."""
    name, equals, value = option.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else option


def _with_values(options: list[str], flags: set[str]) -> list[str]:
    """A flag alone is a flag set: `--quiet` is `--quiet=true`."""
    return [
        f"{option}=true" if option.removeprefix("--") in flags and following not in ("true", "false") else option
        for option, following in zip(options, [*options[1:], ""], strict=True)
    ]
