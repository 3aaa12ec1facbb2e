"""Set up the tests: eight CPU devices, and checks of all annotations of model/ and train/."""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

# With one piece of code per program, and without emitters where they are optional, XLA compiles in
# half of the time.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else "",
    )
)

import beartype
import jax
import jaxtyping
import pytest

# LLVM's optimizations would take most of the time of these tests. Commands that run in processes of
# their own are optimized.
jax.config.update("jax_disable_most_optimizations", True)


def check_calls(function, *args, **kwargs):
    """Check annotations with beartype, except for the fields of dataclasses.

    The fields of a tree of arrays may also hold stacked arrays, shardings and placeholders.
    Configs check their fields themselves.
    """
    is_constructor = function.__name__ == "__init__"
    return function if is_constructor else beartype.beartype(function, *args, **kwargs)


jaxtyping.install_import_hook(
    ["heedful.model", "heedful.train"], f"{__name__}.{check_calls.__name__}"
)


# The garbage collector would walk through all traced programs again and again.
gc.set_threshold(100_000, 50, 100)

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure() -> None:
    """Let the processes of this session share compiled programs and tokenised texts."""
    if not IS_WORKER:  # The workers start later and inherit this environment.
        os.environ["HEEDFUL_CACHE"] = tempfile.mkdtemp(prefix="heedful-tests-")
    jax.config.update("jax_compilation_cache_dir", os.environ["HEEDFUL_CACHE"] + "/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_unconfigure() -> None:
    if not IS_WORKER:
        shutil.rmtree(os.environ["HEEDFUL_CACHE"])


@pytest.fixture
def unchecked():
    """Turn the checks of annotations off, so that a test sees the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
