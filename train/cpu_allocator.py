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
ROOM = 64 << 20  # bytes


def keep_memory() -> None:
    """Start this process again, once, with an allocator that keeps its memory."""
    if sys.platform != "linux" or all(name in os.environ for name in ALLOCATOR):
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in ALLOCATOR.items()})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@cache
def keep_in_place() -> None:
    """Make a step on CPUs find its temporary arrays where those of the last step were.

    Call it before jax has found its devices. The temporary arrays of a program are one block
    of the thread that runs it, and glibc keeps blocks of more than 64 MiB for the main thread only:
    programs run there, and a call returns when they have ended. What a compilation leaves, hundreds
    of MB, is given back before its first run, with room for small arrays: they would otherwise lie
    where a step had its temporary arrays, or right behind, and those of the next step would need a
    place of their own. Programs that are compiled, or read, in less than 0.1 s are too small to
    matter.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # No variable sets this one.
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration") and duration_secs > 0.1:
            libc.malloc_trim(0)
            room, _end = sorted(libc.malloc(ROOM) or 0 for _ in range(2))
            libc.free(room)  # Its end, never written, keeps it apart from the free memory behind.

    jax.monitoring.register_event_duration_secs_listener(listen)
