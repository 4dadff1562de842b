"""`timm-ep COMMAND …`: each command is a dataclass whose fields are its options and whose `run` does the work."""

import sys
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser

# Imported only when asked for: help and errors are to be quick.
COMMANDS = {
    "train": ("timm_ep.trainer", "Trainer"),
    "validate": ("timm_ep.evaluate", "Validate"),
    "predict": ("timm_ep.evaluate", "Predict"),
    "plot": ("timm_ep.plots", "Plot"),
    "study": ("timm_ep.study", "Study"),
    "gradcheck": ("timm_ep.gradcheck", "Gradcheck"),
    "cost": ("timm_ep.cost", "Cost"),
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
    module, command = COMMANDS[name]
    kind = getattr(import_module(module), command)
    parser = ArgumentParser(prog=f"timm-ep {name}")
    parser.add_argument("--config", action="config", help="YAML file with any of these options; others override it")
    parser.add_class_arguments(kind, as_group=False, as_positional=True)
    config = parser.parse_args([_underscored(option) for option in options])
    del config["config"]
    try:
        kind(**vars(parser.instantiate(config))).run()
    except (ValueError, TypeError, FileNotFoundError, FloatingPointError) as error:
        parser.exit(2, f"timm-ep {name}: error: {error}\n")


def _underscored(option: str) -> str:
    """`--batch-size` is `--batch_size`; values keep their hyphens."""
    name, equals, value = option.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else option
