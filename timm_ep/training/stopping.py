"""Stopping a training from outside: after the update under way, once it is safe on the disk."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "StopRequest", "stop_requests"]


class Interrupted(SystemExit):
    """The training was asked to stop and has written a checkpoint; exits with the conventional 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopRequest:
    """The signal that asked the process to stop; 0 as long as none did."""

    number = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While inside, SIGTERM and Ctrl-C are noted and no more; a second one does what it always does."""
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        request.number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
        before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
