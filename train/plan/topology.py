"""Devices that a compiler knows, and that need not be there."""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax

from heedful.train.config import TrainError

FORMS = "v5e:2x2 ... 16x16, v5p:2x2x1 ... 16x20x28, v6e:2x2 ... 16x16"
ABSENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # nor a host that would know, whatever the topology is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor a TPU to share
}
DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}


def devices_of(topology: str | None) -> Sequence[Any]:
    """The chips of a topology such as v5e:16x16; of None those of this machine.

    Raises TrainError for a topology that does not exist, and where its compiler is not installed.
    """
    if topology is None:
        return jax.devices()
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    generation, sizes = found.groups() if found else ("", "")
    if DIMENSIONS.get(generation) != sizes.count("x") + 1:
        raise TrainError(f"unknown topology '{topology}': give one of {FORMS}")
    if find_spec("libtpu") is None:
        raise TrainError(
            f"--topology {topology} needs the compiler for TPUs, libtpu, which is not installed: "
            "pip install -e .[plan]"
        )
    os.environ.update({name: os.environ.get(name, value) for name, value in ABSENT.items()})
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:
        raise TrainError(
            f"the compiler knows no topology '{topology}' ({_first_line(error)}): give one of "
            f"{FORMS}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
