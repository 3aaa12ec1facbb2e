"""Test that memory of a compilation returns to the system, and that steps run in their thread."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from heedful.train.cpu_allocator import ALLOCATOR

COMPILATION = """
import re
import jax
from heedful.train.cpu_allocator import keep_in_place

def resident():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\\s+(\\d+) kB", file.read())[1]) // 1024

def compiled(seconds):
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
    return resident()

keep_in_place()
keep_in_place()
before = resident()
held = [bytes(100_000) for _ in range(2000)]
full = resident()
del held
print(before, full, compiled(0.05), compiled(2.0))
"""


STEP = """
import jax
import jax.numpy as jnp
from heedful.train.cpu_allocator import keep_in_place

keep_in_place()
step = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, lambda _, y: jnp.sin(x @ y), x))
x = jnp.ones((100, 100))
step(x).block_until_ready()
print(step(x).is_ready())
"""


def printed_by(program: str) -> list[str]:
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=os.environ | ALLOCATOR,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return found.stdout.split()


def test_steps_run_in_the_thread_that_asks_for_them():
    assert printed_by(STEP) == ["True"]  # A call in another thread would return before the end.


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_a_compilation_leaves_is_given_back():
    before, full, kept, left = map(int, printed_by(COMPILATION))
    assert full > before + 100  # MiB
    assert kept > full - 20  # The allocator keeps freed memory.
    assert left < before + 20
