"""Signals that ask for an end: SIGTERM and SIGHUP end a command as Ctrl-C does, and none waits for what is awaited."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Stopped(BaseException):
    """A signal asks for an end, which cleans up as an interrupt does."""


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Stopped in here, once: a second one ends the process at once."""

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    # What nohup ignores stays ignored.
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, stop)
    try:
        with _waking():
            yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _waking() -> Iterator[None]:
    """A signal wakes the main thread in here. The kernel may give it to any thread, Python runs handlers in the main
    one alone, and a lock that this one waits for, without an end or for long, isn't left before it was itself
    interrupted: by SIGURG here, which does nothing else."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    main = threading.main_thread().ident
    assert main is not None

    def wake() -> None:
        while numbers := os.read(ours, 4096):  # of the signals that came, a byte each
            if any(number != signal.SIGURG for number in numbers):
                signal.pthread_kill(main, signal.SIGURG)
        os.close(ours)

    before = signal.signal(signal.SIGURG, lambda number, frame: None)
    fd = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    thread = threading.Thread(target=wake, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd)
        os.close(theirs)
        thread.join()
        signal.signal(signal.SIGURG, before)
