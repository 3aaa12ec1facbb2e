"""The memory of a process on a CPU: what glibc's allocator keeps, and what it gives back."""

import ctypes
import os
import sys
from functools import cache

# glibc gives freed memory back to the system between steps and asks for it again: twice the time.
# In pages of 2 MiB, where the system has them, arrays of many MiB are written up to twice as fast.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def keep_memory() -> None:
    """Starts this process again, once, with an allocator that keeps its memory."""
    if sys.platform != "linux" or all(name in os.environ for name in ALLOCATOR):
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in ALLOCATOR.items()})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@cache
def give_back_after_compiling() -> None:
    """From now on what a compilation leaves, hundreds of MB, is given back before its first run."""
    import jax

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if trim and event.endswith("backend_compile_duration") and duration_secs > 1:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
