"""Attention cores by name, and the choice among them.

Every core has the signature of `dense`. A new core is one file and one line here.
"""

from collections.abc import Callable

from model.attention.dense import dense
from model.config import ModelError

ATTENTION: dict[str, Callable] = {"dense": dense}


def choose(core: str, platform: str) -> tuple[str, str]:
    """The name of the core to run on `platform` ("cpu", "gpu", "tpu"), and why."""
    if core == "auto":
        return "dense", f"the only core that runs every mask on {platform}"
    if core not in ATTENTION:
        raise ModelError(
            f"unknown model.attention.core '{core}': choose auto or one of {sorted(ATTENTION)}"
        )
    return core, "chosen by model.attention.core"
