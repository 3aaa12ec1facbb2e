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
import threading
from contextlib import suppress

ENDING = (signal.SIGINT, signal.SIGTERM)
RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again
PATIENCE = 3  # Seconds that the last message and the cleanup may take.

is_saving = False
"""True while the first signal only asks to save."""
leftovers: list[str] = []
"""Folders that are deleted when a signal ends the process."""


def watch(command: str = "") -> None:
    """Start to handle signals in a process that runs this command."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    # A Python handler runs only after native code returns; the write to this pipe does not wait.
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in ENDING:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_enforce, args=(read, command), daemon=True).start()


def _enforce(read: int, command: str) -> None:
    number = _next(read)
    if is_saving:
        number = _next(read)
    # The same command resumes a training run.
    resumes = command == "train"
    code = RESUMABLE if resumes and number == signal.SIGTERM else 128 + number
    late = threading.Timer(PATIENCE, os._exit, [code])
    late.daemon = True
    late.start()
    # A terminal gets its line back, and the cursor that a progress bar hides.
    said = "\x1b[?25h\n" if os.isatty(2) else ""
    said += f"heedful: ended by {signal.Signals(number).name}"
    said += "; the same command resumes from the last checkpoint\n" if resumes else "\n"
    with suppress(OSError):
        os.write(2, said.encode())
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
