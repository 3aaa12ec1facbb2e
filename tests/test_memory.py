"""What a compilation leaves behind is given back to the system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.memory import ALLOCATOR

PROGRAM = """
import re
import jax
from train.memory import tidy_after_compiling

def resident():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\\s+(\\d+) kB", file.read())[1]) // 1024

def compiled(seconds):
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
    return resident()

tidy_after_compiling()
tidy_after_compiling()
held = [bytes(100_000) for _ in range(2000)]
full = resident()
del held
print(full, compiled(0.05), compiled(2.0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_a_compilation_leaves_is_given_back():
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, env=os.environ | ALLOCATOR,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    full, kept, left = map(int, found.stdout.split())
    assert kept > full - 20  # MiB: the allocator keeps the 200 that were freed.
    assert left < full - 150
