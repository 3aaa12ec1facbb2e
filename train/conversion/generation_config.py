"""Convert transformers' generation_config.json to the decode config of a run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from heedful.model.pretrained.generation_keys import (
    BEAM,
    FOLLOWED,
    IRRELEVANT,
    SAMPLING,
    UNSUPPORTED,
)
from heedful.model.pretrained.tensors import read_json
from heedful.train.config import DecodeConfig
from heedful.train.errors import TrainError

FILE = "generation_config.json"
FIELDS = {"num_beams": "beam", "max_new_tokens": "max_tokens", "stop_strings": "stop"}
"""Keys of the file whose field in DecodeConfig has another name."""


def read(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read generation_config.json; in older models its keys are in `config`, their config.json."""
    path = directory / FILE
    if path.is_file():
        return read_json(path)
    return {key: value for key, value in config.items() if key in FOLLOWED or key in UNSUPPORTED}


def follow(
    values: Mapping[str, Any], architecture: str, ends: tuple[int, ...], file: str = FILE
) -> tuple[DecodeConfig, dict[str, str], list[str]]:
    """Return (decode config, {field: key that set the field}, keys that are not followed).

    `file` is the name of the file with `values`. As in transformers, keys that belong to another
    decoding method than the chosen one have no effect. `ends` has the ids of end tokens, which
    `bad_words_ids` cannot exclude. Raises TrainError for a value of a wrong type.
    """
    given = {key: value for key, value in values.items() if value is not None}
    typed = {key: _typed(key, given.get(key, default), file) for key, default in FOLLOWED.items()}
    known = {**dict.fromkeys(IRRELEVANT), **FOLLOWED}
    ignored = [
        key
        for key, value in given.items()
        if key not in known and key[0] != "_" and value != UNSUPPORTED.get(key)
    ]
    keys = ["num_beams", "repetition_penalty"]
    if typed["num_beams"] > 1:
        keys += BEAM
        ignored += ["do_sample"] if typed["do_sample"] else []
    elif typed["do_sample"]:
        keys += SAMPLING
    texts = [key for key in ("max_new_tokens", "stop_strings") if given.get(key)]
    (keys if architecture == "decoder_only" else ignored).extend(texts)

    decode, fields = DecodeConfig(beam=1), {}
    for key in keys:
        changes = {FIELDS.get(key, key): typed[key]}
        changes |= {"length_penalty_offset": 0} if key == "length_penalty" else {}
        try:
            decode = replace(decode, **changes)
            fields |= dict.fromkeys(changes, key)
        except TrainError:  # For example a negative penalty.
            ignored.append(key)
    words = typed["bad_words_ids"]
    if any(len(word) > 1 for word in words):
        ignored.append("bad_words_ids")
    never = {word[0] for word in words if len(word) == 1} - set(ends) | {*typed["suppress_tokens"]}
    if never:
        decode = replace(decode, never=tuple(sorted(never)))
        fields["never"] = "bad_words_ids" if words else "suppress_tokens"
    return decode, fields, ignored


def describe(decode: DecodeConfig, fields: Mapping[str, str], ignored: list[str]) -> list[str]:
    """Describe, in one line each, the fields that the file set and the keys not followed."""
    default = DecodeConfig(beam=1)
    changed = [name for name in fields if getattr(decode, name) != getattr(default, name)]
    listed = [f"decode.{name} = {getattr(decode, name)} ({fields[name]})" for name in changed]
    lines = [f"{FILE}: {', '.join(listed)}"] if listed else []
    if ignored:
        lines.append(
            f"{FILE}: not followed: {', '.join(ignored)}; texts may differ from transformers'"
        )
    return lines


def _typed(key: str, value: Any, file: str) -> Any:
    """Return the value in the type of the decode config; raise TrainError for a wrong type."""
    expected = "a list of token ids"
    is_id = lambda i: type(i) is int and i >= 0  # noqa: E731
    match FOLLOWED[key]:
        case list() if key == "stop_strings":
            texts = [value] if isinstance(value, str) else value
            if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                return tuple(texts)
            expected = "a string or a list of strings"
        case list() if key == "bad_words_ids":
            if isinstance(value, list) and all(
                isinstance(word, list) and word and all(map(is_id, word)) for word in value
            ):
                return value
            expected = "a list of non-empty lists of token ids"
        case list():
            if isinstance(value, list) and all(map(is_id, value)):
                return value
        case float():
            if type(value) in (int, float):
                return float(value)
            expected = "a number"
        case default:
            if type(value) is type(default) or (key, value) == ("early_stopping", "never"):
                return value
            expected = "true or false" if isinstance(default, bool) else "an integer"
            expected = 'true, false or "never"' if key == "early_stopping" else expected
    raise TrainError(f'{file} has "{key}": {value!r}: give {expected}')
