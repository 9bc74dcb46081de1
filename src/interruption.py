"""Leaving cleanly: SIGTERM and Ctrl-C (Jupyter's stop button) become a request that the loop answers between two steps.

A second Ctrl-C interrupts at once. Only the main thread can watch signals; elsewhere nothing is requested.
"""

import signal
import threading
from types import FrameType

from src.environment import in_notebook

INTERRUPTED = 130  # the exit status that shells give a process ended by Ctrl-C
WATCHED = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved where it stands."""


class StopRequest:
    """Within the context, `requested` turns true when the process is asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def leave(self, message: str) -> None:
        """End the run: an interrupt for Ctrl-C, the conventional exit status for SIGTERM."""
        print(message, flush=True)
        if self.signal == signal.SIGTERM and not in_notebook():
            raise SystemExit(128 + signal.SIGTERM)
        raise TrainingInterrupted(message)
