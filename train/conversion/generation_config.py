"""The generation_config.json of transformers, as far as a run's decode config can follow it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from heedful.model.pretrained.tensors import read_json
from heedful.train.config import DecodeConfig, TrainError

FILE = "generation_config.json"
# What has no part in the text that is written, or is read by data/special.py.
SILENT = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
    "transformers_version", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "low_memory", "compile_config", "disable_compile", "prefill_chunk_size",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
)  # fmt: skip
# What no field follows, with the values that change nothing.
OTHERS = {
    "max_length": 20, "min_length": 0, "min_new_tokens": 0, "max_time": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "diversity_penalty": 0.0,
    "num_beam_groups": 1, "num_return_sequences": 1, "guidance_scale": 1.0, "penalty_alpha": None,
    "renormalize_logits": False, "remove_invalid_values": False, "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None, "sequence_bias": None, "token_healing": False,
    "task_specific_params": None,
}  # fmt: skip
# What is followed, with the values that transformers takes where the file gives none.
BEAM = {"length_penalty": 1.0, "early_stopping": False}
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
FOLLOWED: dict[str, Any] = {
    "num_beams": 1, "do_sample": False, **BEAM, **SAMPLING, "repetition_penalty": 1.0,
    "max_new_tokens": 200, "stop_strings": [], "bad_words_ids": [], "suppress_tokens": [],
}  # fmt: skip
FIELDS = {"num_beams": "beam", "max_new_tokens": "max_tokens", "stop_strings": "stop"}


def read(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a model's directory; older ones have them in their config.json, `config`."""
    path = directory / FILE
    if path.is_file():
        return read_json(path)
    return {key: value for key, value in config.items() if key in FOLLOWED or key in OTHERS}


def follow(
    values: Mapping[str, Any], architecture: str, ends: tuple[int, ...]
) -> tuple[DecodeConfig, dict[str, str], list[str]]:
    """(what decodes as these values say, its fields and the keys that set them, keys left out).

    Keys for another way of decoding than the chosen one say nothing, as in transformers. Raises
    TrainError for a value of another type.
    """
    given = {key: value for key, value in values.items() if value is not None}
    taken = {key: _typed(key, given.get(key, default)) for key, default in FOLLOWED.items()}
    known = {**dict.fromkeys(SILENT), **FOLLOWED}
    left = [k for k in given if k not in known and k[0] != "_" and given[k] != OTHERS.get(k)]
    keys = ["num_beams", "repetition_penalty"]
    if taken["num_beams"] > 1:
        keys += BEAM
        left += ["do_sample"] if taken["do_sample"] else []
    elif taken["do_sample"]:
        keys += SAMPLING
    texts = [key for key in ("max_new_tokens", "stop_strings") if given.get(key)]
    (keys if architecture == "decoder_only" else left).extend(texts)

    decode, fields = DecodeConfig(beam=1), {}
    for key in keys:
        changes = {FIELDS.get(key, key): taken[key]}
        changes |= {"length_penalty_offset": 0} if key == "length_penalty" else {}
        try:
            decode = replace(decode, **changes)
            fields |= dict.fromkeys(changes, key)
        except TrainError:  # Such as a negative penalty, which there is not here.
            left.append(key)
    words = taken["bad_words_ids"]
    if any(len(word) > 1 for word in words):
        left.append("bad_words_ids")
    never = {word[0] for word in words if len(word) == 1} - set(ends) | {*taken["suppress_tokens"]}
    if never:
        decode = replace(decode, never=tuple(sorted(never)))
        fields["never"] = "bad_words_ids" if words else "suppress_tokens"
    return decode, fields, left


def describe(decode: DecodeConfig, fields: Mapping[str, str], left: list[str]) -> list[str]:
    """Lines on what a run takes over, where no flag said otherwise, and on what it leaves out."""
    default = DecodeConfig(beam=1)
    changed = [name for name in fields if getattr(decode, name) != getattr(default, name)]
    listed = [f"decode.{name} = {getattr(decode, name)} ({fields[name]})" for name in changed]
    lines = [f"{FILE}: {', '.join(listed)}"] if listed else []
    if left:
        lines.append(
            f"{FILE}: not followed: {', '.join(left)}; texts may differ from transformers'"
        )
    return lines


def _typed(key: str, value: Any) -> Any:
    """The value, as a decode config has it."""
    is_id = lambda i: type(i) is int and i >= 0  # noqa: E731
    match FOLLOWED[key]:
        case list() if key == "stop_strings":
            texts = [value] if isinstance(value, str) else value
            if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                return tuple(texts)
        case list() if key == "bad_words_ids":
            if isinstance(value, list) and all(
                isinstance(word, list) and word and all(map(is_id, word)) for word in value
            ):
                return value
        case list():
            if isinstance(value, list) and all(map(is_id, value)):
                return value
        case float():
            if type(value) in (int, float):
                return float(value)
        case default:
            if type(value) is type(default) or (key, value) == ("early_stopping", "never"):
                return value
    raise TrainError(f'{FILE} has "{key}": {value!r}, which transformers cannot read: correct it')
