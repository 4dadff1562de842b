"""A process of its own for clients of the test server: huggingface_hub reads HF_ENDPOINT once, when it is imported."""

import contextlib
import io
import logging
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock


class Client:
    """`client(function, *args, token=…, **kwargs)` calls a function there, and returns or raises what it does.

    Attributes:
        home: HF_HOME of the process, with its cache.
        output: what all calls so far printed, logged (at debug level) or raised, with tracebacks.
    """

    def __init__(self, url: str, home: Path) -> None:
        self.home, self.output = home, ""
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
        with mock.patch.dict(os.environ, environment):
            for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
                os.environ.pop(name, None)
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            self.pool.submit(_prepare).result()  # starts the process, with these variables

    def __call__(
        self, function: Callable[..., Any], *args: Any, token: str | None = "hf_alicealicealicealice", **kwargs
    ):
        """Call with HF_TOKEN set to `token`."""
        value, error, output = self.pool.submit(_call, token, function, args, kwargs).result(timeout=300)
        self.output += output
        if error is not None:
            raise error
        return value

    def cached(self) -> list[Path]:
        """Files in the client's cache, but for locks and notes."""
        found = (self.home / "hub").rglob("*")
        return [path for path in found if path.is_file() and ".locks" not in path.parts and "CACHEDIR" not in path.name]


def _prepare() -> None:
    time.sleep = lambda seconds: None  # the client's patience, which is seconds a retry, is not what is tested
    logging.basicConfig(level=logging.DEBUG, force=True)
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_debug()
    hub_logging.enable_propagation()


def _call(token: str | None, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any, str]:
    if token is None:
        os.environ.pop("HF_TOKEN", None)
    else:
        os.environ["HF_TOKEN"] = token
    output, value, error = io.StringIO(), None, None
    handler = logging.StreamHandler(output)
    logging.getLogger().addHandler(handler)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            value = function(*args, **kwargs)
        except (Exception, SystemExit) as raised:  # noqa: BLE001  (whatever it is goes back)
            output.write(traceback.format_exc())
            try:
                pickle.loads(pickle.dumps(raised))  # noqa: S301
                error = raised
            except Exception:  # noqa: BLE001  (pickling may raise anything)
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
    logging.getLogger().removeHandler(handler)
    return value, error, output.getvalue()
