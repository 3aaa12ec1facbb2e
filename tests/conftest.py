"""Eight CPU devices, and every annotation of model/ and train/ checked at each call."""

import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import beartype
import jax
import jaxtyping
import pytest

# Most of the time of these tests is LLVM's. Commands, in processes of their own, are optimized.
jax.config.update("jax_disable_most_optimizations", True)


def check_calls(function, *args, **kwargs):
    """Beartype, except for the fields of dataclasses.

    A tree of arrays also holds stacked arrays, shardings and placeholders in its fields, and
    configs check theirs themselves.
    """
    is_constructor = function.__name__ == "__init__"
    return function if is_constructor else beartype.beartype(function, *args, **kwargs)


jaxtyping.install_import_hook(
    ["heedful.model", "heedful.train"], f"{__name__}.{check_calls.__name__}"
)


IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure() -> None:
    """Let the processes of this session share what one has compiled or tokenised."""
    if not IS_WORKER:  # workers are started later, in this environment
        os.environ["HEEDFUL_CACHE"] = tempfile.mkdtemp(prefix="heedful-tests-")
    jax.config.update("jax_compilation_cache_dir", os.environ["HEEDFUL_CACHE"] + "/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_unconfigure() -> None:
    if not IS_WORKER:
        shutil.rmtree(os.environ["HEEDFUL_CACHE"])


@pytest.fixture
def unchecked():
    """As outside of tests, where no annotation is checked: for the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
