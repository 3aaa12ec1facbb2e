"""Settings of glibc's memory allocator for programs on CPUs."""

import ctypes
import os
import sys
from functools import cache

# By default, glibc returns freed memory to the system between steps and requests it again, which
# doubles the time of a step. With pages of 2 MiB, if the system has them, arrays of many MiB are
# written up to twice as fast.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
ROOM = 64 << 20  # bytes


def keep_memory() -> None:
    """Restart this process, once, with settings by which the allocator keeps freed memory."""
    if sys.platform != "linux" or all(name in os.environ for name in ALLOCATOR):
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in ALLOCATOR.items()})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@cache
def keep_in_place() -> None:
    """Let each step on CPUs reuse the memory of the temporary arrays of the step before.

    Call this before jax has found its devices. The temporary arrays of a program are one block of
    memory of the thread that runs the program, and glibc keeps blocks of more than 64 MiB only for
    the main thread. So programs run in the main thread, and a call returns when its program has
    ended. A compilation leaves hundreds of MB of freed memory. They are returned to the system
    before the first run, and room for small arrays is reserved: otherwise small arrays could take
    the memory where a step had its temporary arrays, or the memory right after it, and the next
    step would need another block. Programs that are compiled, or loaded, in less than 0.1 s are too
    small to matter.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # No environment variable sets this.
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration") and duration_secs > 0.1:
            libc.malloc_trim(0)
            room, _end = sorted(libc.malloc(ROOM) or 0 for _ in range(2))
            libc.free(room)  # `_end`, never written, separates it from the free memory after it.

    jax.monitoring.register_event_duration_secs_listener(listen)
