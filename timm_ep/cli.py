"""`timm-ep COMMAND …`: each command is a dataclass whose fields are its options and whose `run` does the work."""

import dataclasses
import io
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import ArgumentParser

from timm_ep.base.malloc import keep_freed_memory
from timm_ep.hub.redaction import holds_secret, redacted

# Imported only when asked for: help and errors are to be quick.
COMMANDS = {
    "train": ("timm_ep.training.trainer", "Trainer", "train, resume or fine-tune a model"),
    "validate": ("timm_ep.training.evaluate", "Validate", "test a saved run again"),
    "predict": ("timm_ep.training.predict", "Predict", "classify images with a saved run"),
    "convert": ("timm_ep.training.convert", "Convert", "make a start for EP of a trained VGG of timm"),
    "export": ("timm_ep.hub.graphs", "Export", "write a model's inference as ONNX or an exported program"),
    "plot": ("timm_ep.hub.curves", "Plot", "draw runs side by side"),
    "study": ("timm_ep.studies.study", "Study", "table and figures of many runs"),
    "gradcheck": ("timm_ep.studies.gradcheck", "Gradcheck", "compare EP's gradient with the exact one, layer by layer"),
    "benchmark": ("timm_ep.studies.benchmark", "Benchmark", "time EP beside backprop, BPTT and the literature's EP"),
    "cost": ("timm_ep.studies.cost", "Cost", "a step's time and memory by EP and BPTT, over the sweeps"),
    "scaling": ("timm_ep.studies.scaling", "Scaling", "a step's time and memory over batch, pixels, depth and width"),
    "analog": ("timm_ep.studies.analog", "Analog", "what an update takes of an analog device"),
    "card": ("timm_ep.hub.cards", "Card", "write a model's card"),
    "publish": ("timm_ep.hub.publishing", "Publish", "publish a run on the Hugging Face Hub"),
    "pull": ("timm_ep.hub.publishing", "Pull", "download a model from the Hub and check it"),
}

_SUMMARIES = "\n".join(f"  {name:<11}{summary}" for name, (*_, summary) in COMMANDS.items())
_USAGE = f"""usage: timm-ep COMMAND …

{_SUMMARIES}
  run        run a script or module of timm's, unmodified, with the models of this package

Options of a command: timm-ep COMMAND --help. --img-size is --img_size; --model-args.tol 0.02 sets one entry of a dict.
"""

# Errors whose messages are written for users.
_EXPLAINED = (ValueError, TypeError, OSError, FloatingPointError, MemoryError, ModuleNotFoundError)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and a one-line message on a user's error, silently where nobody reads on."""
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and classes may be of any alphabet, or no text at all
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed goes nowhere
        sys.exit(128 + 13)


def _main(words: list[str]) -> None:
    if not words or words[0] not in (*COMMANDS, "run"):
        helped = words[:1] in ([], ["-h"], ["--help"])
        (sys.stdout if helped else sys.stderr).write(_USAGE if helped else f"unknown command {words[0]!r}\n{_USAGE}")
        sys.exit(0 if helped else 2)
    name, *options = words
    if name == "run":
        return run_script(options)
    if any(map(holds_secret, options)):
        message = "an option holds an access token or a password, which would end in logs and in the shell's history"
        sys.stderr.write(f"timm-ep {name}: error: {message}; log in with `hf auth login` or set HF_TOKEN.\n")
        sys.exit(2)
    module, command, _ = COMMANDS[name]
    kind = getattr(import_module(module), command)
    parser = ArgumentParser(prog=f"timm-ep {name}")
    parser.add_argument("--config", action="config", help="YAML file with any of these options; others override it")
    parser.add_argument("--debug", action="store_true", help="show where an error arose")
    parser.add_class_arguments(kind, as_group=False, as_positional=True)
    flags = {option.name for option in dataclasses.fields(kind) if option.type is bool}
    try:
        config = parser.parse_args(_with_values(_config_first([_underscored(option) for option in options]), flags))
    except UnicodeDecodeError as error:
        parser.exit(2, f"timm-ep {name}: error: the file of --config is not text in UTF-8: {error}; save it as that.\n")
    debug = config.pop("debug")
    del config["config"]
    try:
        values = vars(parser.instantiate(config))
        kind(**values).run()
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        more = "; what it had done by then goes on with --resume" if name == "train" else ""
        parser.exit(128 + 2, f"timm-ep {name}: interrupted{more}.\n")
    except Exception as error:
        if debug:
            raise
        message = "; ".join(line.strip() for line in redacted(str(error)).splitlines() if line.strip())
        if isinstance(error, MemoryError):
            message = message or "there is not enough memory; fewer or smaller images at a time (batch_size) take less"
        if isinstance(error, _EXPLAINED):
            parser.exit(2, f"timm-ep {name}: error: {message}\n")
        parser.exit(1, f"timm-ep {name}: unexpected {type(error).__name__}: {message}\n--debug shows where it arose.\n")


def run_script(words: Sequence[str]) -> None:
    """Run a Python script or module as if by itself, with the models of this package registered.

    Args:
        words: the script's path, or a module's name, and its own arguments.
    """
    import_module("timm_ep")
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        sys.exit(0 if words else 2)
    script = words[0]
    sys.argv = list(words)
    if Path(script).is_file():
        sys.path.insert(0, str(Path(script).resolve().parent))  # where Python puts it for a script
        runpy.run_path(script, run_name="__main__")
    elif all(map(str.isidentifier, script.split("."))) and find_spec(script.partition(".")[0]):
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.stderr.write(f"timm-ep run: error: {script} is neither a file nor a module that can be imported.\n")
        sys.exit(2)


def _underscored(option: str) -> str:
    """`--batch-size` is `--batch_size`; values keep their hyphens."""
    name, equals, value = option.partition("=")
    if name == "--config":  # which is read before the paths in it are
        value = os.path.expanduser(os.path.expandvars(value))
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else option


def _config_first(options: list[str]) -> list[str]:
    """The file of options before those that override it, wherever it stands: what is parsed last counts."""
    files = {index for index, option in enumerate(options) if option.startswith("--config=")}
    for index, option in enumerate(options):
        if option == "--config" and index + 1 < len(options):
            files |= {index, index + 1}
    chosen = [option for index, option in enumerate(options) if index in files]
    return chosen + [option for index, option in enumerate(options) if index not in files]


def _with_values(options: list[str], flags: set[str]) -> list[str]:
    """A flag alone is a flag set: `--quiet` is `--quiet=true`."""
    return [
        f"{option}=true"
        if option.removeprefix("--") in flags and following.lower() not in ("true", "false")
        else option
        for option, following in zip(options, [*options, ""][1:], strict=True)
    ]
