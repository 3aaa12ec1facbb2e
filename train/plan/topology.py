"""Devices to compile for that need not be present."""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax

from heedful.train.errors import TrainError

FORMS = "v5e:2x2 ... 16x16, v5p:2x2x1 ... 16x20x28, v6e:2x2 ... 16x16"
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # Outside of a TPU host there is no metadata server.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # Needed for every topology, without effect on it.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Processes share no TPU here.
}
"""Variables that let libtpu compile on a machine without a TPU."""
DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}


def devices_of(topology: str | None) -> Sequence[Any]:
    """Return the devices of a topology such as v5e:16x16; None means this machine.

    Raises TrainError for an unknown topology, and if its compiler is not installed.
    """
    if topology is None:
        return jax.devices()
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    generation, sizes = found.groups() if found else ("", "")
    if DIMENSIONS.get(generation) != sizes.count("x") + 1:
        raise TrainError(f"--topology {topology}: unknown topology; give one of {FORMS}")
    if find_spec("libtpu") is None:
        raise TrainError(
            f"--topology {topology}: the TPU compiler libtpu is not installed; "
            "pip install 'heedful[plan]'"
        )
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:
        raise TrainError(
            f"--topology {topology}: unknown to the compiler ({_first_line(error)}); give one of "
            f"{FORMS}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
