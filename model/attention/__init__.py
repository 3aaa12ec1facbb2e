"""Attention cores by name, and the choice among them.

A core is called as `dense` is. A name stands for a function from the model's config to a core,
which may be a module with parameters of its own. A new core is one file and one line here.
"""

from collections.abc import Callable

from heedful.model.attention.cudnn import cudnn
from heedful.model.attention.dense import dense
from heedful.model.attention.flash import flash
from heedful.model.attention.linformer import Linformer
from heedful.model.attention.longformer import longformer
from heedful.model.attention.performer import Performer
from heedful.model.attention.ring import ring
from heedful.model.attention.splash import splash
from heedful.model.config import ModelConfig, ModelError

ATTENTION: dict[str, Callable[[ModelConfig], Callable]] = {
    "dense": lambda config: dense,
    "flash": lambda config: flash,
    "longformer": lambda config: longformer,
    "linformer": lambda config: Linformer(config.attention.linformer, name="linformer"),
    "performer": lambda config: Performer(config.attention.performer, name="performer"),
    "cudnn": lambda config: cudnn,
    "splash": lambda config: splash,
    "ring": lambda config: ring,
}

WITHOUT_WEIGHTS = frozenset({"linformer", "performer"})
"""Cores that never compute what share a query takes of a key."""

INEXACT = frozenset({"linformer", "performer"})
"""Cores that compute another function than dense."""

ONE_DOCUMENT = frozenset({"cudnn", "linformer"})
"""Cores that cannot tell documents of one row apart: the row comes out as NaN."""

FLASH_FROM = 512
"""Queries and keys from which flash is faster than dense on a CPU, forward and backward."""


def choose(
    core: str, platform: str, length: int, queries: int | None = None, shards: int = 1
) -> tuple[str, str]:
    """The name of the core to run on `platform` ("cpu", "gpu", "tpu") on `length` keys, and why.

    There are as many queries, or `queries`: few when decoding. `shards` says over how many devices
    the mesh splits the length.
    """
    if core == "auto":
        pairs = length * (length if queries is None else queries)
        if shards > 1:
            return "dense", f"exact, and takes what the mesh splits over {shards} devices"
        if platform == "cpu" and pairs >= FLASH_FROM**2:
            return "flash", f"exact, and faster than dense on {platform} from {FLASH_FROM} keys on"
        return "dense", f"exact, and runs every mask on {platform}"
    if core not in ATTENTION:
        raise ModelError(
            f"unknown model.attention.core '{core}': choose auto or one of {sorted(ATTENTION)}"
        )
    return core, "chosen by model.attention.core"
