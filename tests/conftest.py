"""Eight CPU devices, and every annotation of model/ and train/ checked at each call."""

import os

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


@pytest.fixture
def unchecked():
    """As outside of tests, where no annotation is checked: for the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
