"""SIGINT and SIGTERM, handled in one way during every phase of a command.

The first signal ends the command at once if nothing can be lost. While `train.stop.Stop` has
something to save, the first signal only requests that, and the second signal ends the command. A
thread ends the command, because the main thread may be in a compiler, and because an exception
inside of another library may be swallowed, or abort the process.
"""

import os
import shutil
import signal
import sys
import termios
import threading
import time
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)
RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again
PATIENCE = 3  # Seconds that the last message and the cleanup may take.

is_saving = False
"""True while the first signal only asks to save."""
leftovers: list[str] = []
"""Folders that are deleted when a signal ends the process."""
terminal: list[Any] | None = None
"""Settings of the terminal (termios) that are restored then, as a prompt changes them; None: there
is no prompt."""


def watch(command: str = "") -> None:
    """Start to handle signals in a process that runs this command."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    # A Python handler runs only after native code returns; the write to this pipe does not wait.
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in ENDING:
        signal.signal(number, lambda *_: None)
    # Both threads start now: while Python ends, it starts no thread any more.
    codes: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_enforce, args=(read, command, codes), daemon=True).start()
    threading.Thread(target=_end_late, args=(codes,), daemon=True).start()


def _say(text: str, start: str) -> None:
    """Print a line to standard error; `start` goes before it in a terminal."""
    with suppress(OSError):
        os.write(2, f"{start if os.isatty(2) else ''}heedful: {text}\n".encode())


def _end_late(codes: SimpleQueue[int]) -> None:
    """End the process with a code, PATIENCE seconds after the code is put into the queue."""
    code = codes.get()
    time.sleep(PATIENCE)
    os._exit(code)


def _enforce(read: int, command: str, codes: SimpleQueue[int]) -> None:
    number = _next(read)
    if is_saving:  # Answer at once: the step in progress, or a compiler, may take minutes.
        # The message replaces the line of a progress bar, which is drawn again below.
        name = signal.Signals(number).name
        _say(
            f"{name}: saving and stopping after the current step; a second {name} stops at once",
            "\r\x1b[2K",
        )
        number = _next(read)
    # The same command resumes a training run.
    resumes = command == "train"
    code = RESUMABLE if resumes and number == signal.SIGTERM else 128 + number
    codes.put(code)
    said = f"ended by {signal.Signals(number).name}"
    said += "; the same command resumes from the last checkpoint" if resumes else ""
    _say(said, "\x1b[?25h\n")  # Show the cursor, which a progress bar hides.
    if terminal is not None:
        with suppress(OSError, termios.error):
            termios.tcsetattr(0, termios.TCSANOW, terminal)
    children = getattr(sys.modules.get("multiprocessing"), "active_children", list)
    for child in children():
        child.kill()
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


def _next(read: int) -> int:
    """Wait for the next of these signals, and return its number."""
    while True:
        if (number := os.read(read, 1)[0]) in ENDING:
            return number
