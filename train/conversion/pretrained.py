"""Open and save pretrained models as config, parameters and tokenizer, without a mesh."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heedful.data.reading import parse_json
from heedful.data.tokenizer import Tokenizer
from heedful.model.config import ModelConfig
from heedful.train.audit.subject import require_fits
from heedful.train.conversion.export_run import export_model
from heedful.train.conversion.source import open_source
from heedful.train.errors import TrainError
from heedful.train.messages import quiet


def from_pretrained(path: str | Path) -> tuple[ModelConfig, dict[str, Any], Tokenizer]:
    """Return (config, params, tokenizer) of a pretrained model.

    path: a directory of a Hugging Face model (config.json, safetensors, tokenizer.json), a
    directory of a run, or a package: package:minilm or package:stories15m. A run gives the
    parameters that `heedful evaluate` uses; low-rank updates become part of the matrices.
    Nothing is downloaded: a name of the Hugging Face hub is no path.
    params: a plain tree of float32 arrays on the default device, as `init` makes it; `build` makes
    the model.

    Parts of the files that are left out are told in warnings. Raises TrainError for a directory
    that holds neither, and ModelError and DataError for models and tokenizers that are not
    supported.

    Example:
        >>> import tempfile, jax, heedful as hf
        >>> tokenizer = hf.Tokenizer.train(["red cat"], hf.TokenizerConfig(kind="chars"))
        >>> config = hf.ModelConfig(architecture="decoder_only", vocab_size=tokenizer.vocab_size,
        ...     width=16, layers=1, attention=hf.AttentionConfig(heads=2), tie_embeddings=False,
        ...     scale_embeddings=False, positions=hf.PositionConfig(kind="rotary"),
        ...     feed_forward=hf.FeedForwardConfig(activation="silu", gated=True, bias=False),
        ...     norm=hf.NormConfig(kind="rmsnorm", position="pre"))
        >>> params = hf.init(hf.build(config), jax.random.key(0))
        >>> directory = tempfile.mkdtemp()
        >>> hf.save_pretrained(directory, config, params, tokenizer)
        >>> config, params, tokenizer = hf.from_pretrained(directory)
        >>> config.width, params["embedding"]["table"].shape
        (16, (11, 16))
    """
    source = open_source(_name(str(path)), quiet())
    for note in source.notes:
        warnings.warn(f"{source.name}: {note}", stacklevel=2)
    return source.model, jax.tree.map(jnp.asarray, source.params()), source.tokenizer


def save_pretrained(
    directory: str | Path,
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    *,
    labels: Sequence[str] = (),
) -> None:
    """Write a model as transformers' from_pretrained reads it, like `heedful export`.

    The files are config.json, model.safetensors and the files of the tokenizer. labels: names of
    the classes of a classifier. Raises TrainError for a directory that is not empty and for
    parameters of another model, and ModelError for a model that no family of transformers can
    express; the message names the config field.

    Example:
        >>> import heedful as hf
        >>> config = hf.ModelConfig(architecture="decoder_only", vocab_size=9, width=16, layers=1)
        >>> tokenizer = hf.Tokenizer.train(["a b"], hf.TokenizerConfig(kind="words"))
        >>> try:
        ...     hf.save_pretrained("exported", config, {}, tokenizer)
        ... except hf.TrainError as error:
        ...     print(error)
        params have other names or shapes than those of the model: give its own
    """
    require_fits(config, params)
    export_model(Path(directory), config, jax.tree.map(np.asarray, params), tokenizer, labels)


def _name(path: str) -> str:
    """Return the name by which `open_source` knows a path: hf:DIR for a Hugging Face directory."""
    config = Path(path).expanduser() / "config.json"
    if path.startswith(("hf:", "package:")):
        return path
    if not config.is_file():
        raise TrainError(
            f"{path} has no config.json: give the directory of a model or of a run; a model of the "
            "Hugging Face hub is downloaded with hf download NAME --local-dir DIRECTORY"
        )
    try:
        values = parse_json(config.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{config} cannot be read: {error}; restore the file") from error
    is_run = isinstance(values, dict) and {"model", "data", "train"} <= values.keys()
    return path if is_run else f"hf:{path}"
