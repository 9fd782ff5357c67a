"""SIGINT, SIGTERM and SIGHUP: finish the step, save, and say so; a second one stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class RunInterrupted(SystemExit):
    """A run that a signal has stopped. Uncaught, the process ends with the conventional status, 128 + the signal's number.

    Args:
        signal_number: 2 for SIGINT, 15 for SIGTERM.
        checkpoint: from which the run goes on; None where none could be written, or the run was finished.

    After SIGINT it is a `KeyboardInterrupt` too (`RunInterruptedByUser`), for those who catch that.
    """

    def __init__(self, signal_number: int, checkpoint: Path | None):
        super().__init__(128 + signal_number)
        self.signal_number, self.checkpoint = signal_number, checkpoint


class RunInterruptedByUser(RunInterrupted, KeyboardInterrupt):
    """`RunInterrupted` after SIGINT."""


def run_interrupted(signal_number: int, checkpoint: Path | None) -> RunInterrupted:
    """The exception for a signal."""
    kind = RunInterruptedByUser if signal_number == signal.SIGINT else RunInterrupted
    return kind(signal_number, checkpoint)


class StopRequest:
    """Whether a signal has asked the run to stop, and which."""

    signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextlib.contextmanager
def stop_on_signals(*, says_so: bool = True) -> Iterator[StopRequest]:
    """Note the first of `SIGNALS` in the request that is handed out, instead of acting on it.

    A second signal acts at once: SIGINT raises `KeyboardInterrupt`, the others end the process. The handlers before are
    restored after. A signal that was ignored before (`nohup`, a shell's background jobs) stays ignored. Outside the main
    thread, where Python allows no handlers, nothing is touched.

    Args:
        says_so: write a line to stderr when the first one comes.
    """
    request = StopRequest()

    installed: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        request.signal_number = number
        for each in installed:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
        # Not through logging or print, whose streams the signal may have interrupted in the middle of a write.
        name = signal.Signals(number).name
        if not says_so:
            return
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: stopping after this step. A second signal stops at once.\n".encode())

    try:
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                installed[number] = signal.signal(number, note)
            except ValueError:
                break
        yield request
    finally:
        for number, previous in installed.items():
            # None stands for a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
