"""Export the model of a run to the files of transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.data.tokenizer import Tokenizer
from heedful.model import pretrained
from heedful.model.config import ModelConfig
from heedful.train.config_json import write_json
from heedful.train.errors import TrainError
from heedful.train.hosts import is_first, to_host
from heedful.train.load import Trained


def export_run(trained: Trained, directory: Path, console: Console) -> None:
    """Write safetensors, config.json and the tokenizer for transformers.

    Raises TrainError for a directory that is not empty, and ModelError for a model that no model
    family of transformers can express.
    """
    _require_empty(directory)
    params = to_host(trained.params)
    if not is_first():
        return
    export_model(directory, trained.run.model, params, trained.tokenizer, trained.run.data.classes)
    console.print(
        f"exported to {directory}: {', '.join(sorted(p.name for p in directory.iterdir()))}"
    )


def export_model(
    directory: Path,
    model: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    labels: Sequence[str] = (),
) -> None:
    """Write a model with its parameters on the host; errors are those of `export_run`."""
    _require_empty(directory)
    model, params = pretrained.merge_lora(model, params)
    files = {} if tokenizer.special is None else tokenizer.special.files
    roles = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    special = {f"{role}_token_id": i for role, i in roles.items() if i is not None}
    if "config.json" in files:
        values = files["config.json"]
        ids = {key: value for key, value in values.items() if key != "model_type"}
        special = _within(ids, model.vocab_size or 0)
    if model.architecture == "encoder_decoder" and tokenizer.bos is not None:
        special.setdefault("decoder_start_token_id", tokenizer.bos)
    family = str(files.get("config.json", {}).get("model_type", ""))
    pretrained.write(directory, model, params, special=special, labels=labels, model_type=family)
    framing = tokenizer.framing(model.architecture).following(None)
    framing.save(directory / "tokenizer.json")
    # The class of transformers for a tokenizer that tokenizer.json fully describes.
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = [
        "input_ids",
        *(["token_type_ids"] if model.type_vocab_size > 1 else []),
        "attention_mask",
    ]
    values |= {"model_input_names": names, "clean_up_tokenization_spaces": False}
    named = roles | {"unk": tokenizer.unk, "mask": tokenizer.mask}
    if tokenizer.is_bare and tokenizer.special is None:  # The text "<eos>" is not the token.
        values["split_special_tokens"] = True
    if model.architecture == "decoder_only":
        values["padding_side"] = "left"
    values |= {f"{role}_token": tokenizer.name(i) for role, i in named.items() if i is not None}
    values |= files.get("tokenizer_config.json", {})
    write_json(directory / "tokenizer_config.json", values)
    if (name := "generation_config.json") in files and model.head.kind == "language_model":
        write_json(directory / name, files[name])


def _require_empty(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()):
        raise TrainError(f"{directory} is not empty: give another directory to export to")


def _within(special: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return `special` without the token ids from `size` on; a list stays a list."""
    result = {}
    for key, value in special.items():
        inside = [i for i in (value if isinstance(value, list) else [value]) if i in range(size)]
        if inside:
            result[key] = inside if isinstance(value, list) else value
    return result
