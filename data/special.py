"""Special tokens from the files of a tokenizer and of its model.

Without these files, a tokenizer finds its special tokens by their names.
"""

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from heedful.data.errors import DataError
from heedful.data.reading import parse_json
from heedful.data.writing import write_whole

FILE = "special_tokens.json"
"""File with the special tokens of a run, in the same folder as its tokenizer.json."""
CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
# Names of the roles in these files, BERT's names first.
NAMES = {
    "pad": ("pad_token",),
    "bos": ("cls_token", "bos_token"),
    "eos": ("sep_token", "eos_token"),
    "mask": ("mask_token",),
}
ROLES = (*NAMES, "unk")
EXPORTED = ("split_special_tokens",)
"""Settings that an export writes unchanged."""
LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, kw_only=True)
class Special:
    """Ids of special tokens that files name; None: no file names this token."""

    pad: int | None = None
    bos: int | None = None
    eos: int | None = None
    """Token at the end of a text in training data."""
    unk: int | None = None
    mask: int | None = None
    ends: tuple[int, ...] = ()
    """All tokens that end generation; empty: `eos` alone."""
    named: tuple[int, ...] = ()
    """Tokens that the tokenizer's files mark as special."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Values of each file, by the name of the file; an export writes these values again."""

    def changes(self, roles: Mapping[str, int | None], marked: Set[int]) -> dict[str, Any]:
        """Return what these files change, as a dict.

        `roles` and `marked` are the roles and the special tokens that were found by token names.
        The dict has each role whose id differs from `roles`, `ends` if it is not the end token
        alone, and as `named` the tokens that are not in `marked`.
        """
        own = {role: getattr(self, role) for role in ROLES}
        now = dict(roles) | {role: id for role, id in own.items() if id is not None}
        changes: dict[str, Any] = {role: id for role, id in now.items() if id != roles[role]}
        if self.ends not in ((), (now["eos"],)):
            changes["ends"] = self.ends
        if named := set(self.named) - marked:
            changes["named"] = sorted(named)
        return changes

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, size: int) -> "Special":
        """Read a file that `save` wrote; raise DataError for another file, or an id >= `size`."""
        values = read_json(path)
        ids = [[values[role]] for role in ROLES if values.get(role) is not None]
        lists: dict[str, Any] = {name: values.get(name) for name in ("ends", "named")}
        is_whole = values.keys() == {entry.name for entry in fields(cls)}
        is_whole = is_whole and isinstance(values["files"], dict)
        if not is_whole or not all(_are_ids(some, size) for some in [*ids, *lists.values()]):
            raise DataError(f"{path} is not the special_tokens.json of this run: restore the file")
        values |= {name: tuple(some) for name, some in lists.items()}
        return cls(**values)


def named_beside(path: Path, vocabulary: Mapping[str, int], unknown: int | None) -> Special | None:
    """Return the special tokens that MAP and CONFIG beside a tokenizer name; None: no such files.

    `path` is the file of the tokenizer. Names that the vocabulary lacks are ignored. `unknown` is
    the id of text outside of the vocabulary; None: there is no such id.
    """
    if not any(path.with_name(file).is_file() for file in (MAP, CONFIG)):
        return None
    values = read_config(path)
    names = {key: name for key, name in names_in(values).items() if name in vocabulary}
    ids = {key: vocabulary[name] for key, name in names.items()}
    pad, bos, eos, mask = (
        next((ids[k] for k in keys if k in ids), None) for keys in NAMES.values()
    )
    kept = {key: values[key] for key in EXPORTED if type(values.get(key)) is bool}
    named = {ids[key] for keys in NAMES.values() for key in keys if key in ids}
    listed = [some for key in LISTS if isinstance(some := values.get(key), list)]
    contents = [content for some in listed for token in some if (content := _content(token))]
    named |= {vocabulary[content] for content in contents if content in vocabulary}
    return Special(
        pad=pad,
        bos=bos,
        eos=eos,
        unk=None if unknown in named else unknown,
        mask=mask,
        named=tuple(sorted(named)),
        files={CONFIG: names | kept},
    )


def names_in(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of special tokens in a tokenizer_config.json, by key (eos_token, ...)."""
    spelled = {key: _content(value) for key, value in values.items() if key.endswith("_token")}
    return {key: content for key, content in spelled.items() if content is not None}


def read_config(path: Path) -> dict[str, Any]:
    """Return the values of MAP and CONFIG beside the tokenizer `path`; {} without these files."""
    found = [path.with_name(file) for file in (MAP, CONFIG)]
    return {key: v for file in found if file.is_file() for key, v in read_json(file).items()}


def with_model_files(
    special: Special, files: Mapping[str, Mapping[str, Any]], size: int, *, architecture: str
) -> tuple[Special, list[str]]:
    """Return `special` with the ids in the files of a model, and messages about unused ids.

    `files` has the values of config.json, then of generation_config.json, which overrides
    config.json, as in transformers. For an encoder-only model the tokenizer overrides the model's
    ids; for other models the model overrides the tokenizer. `size` is the size of the vocabulary;
    larger ids are not used. Raises DataError for a value that is not an id.
    """
    ids, notes = {}, []
    for file, values in files.items():
        for key, value in values.items():
            if not key.endswith("_token_id") or value is None:
                continue
            some = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= -1 for i in some):
                raise DataError(
                    f'{file} has "{key}": {value!r}: give a token id, or a list of token ids'
                )
            outside = [i for i in some if not 0 <= i < size]
            if outside not in ([], [-1]):  # The id -1 means: no token.
                notes.append(
                    f"{file}: {key} {', '.join(map(str, outside))} is not used, as the tokenizer "
                    f"has {size:,} tokens"
                )
            if inside := [i for i in some if 0 <= i < size]:
                ids[key] = inside
    first = lambda *keys: next((ids[key][0] for key in keys if key in ids), None)  # noqa: E731
    begins = ("decoder_start_token_id",) if architecture == "encoder_decoder" else ()
    of_files = {
        "pad": first("pad_token_id"),
        "bos": first(*begins, "bos_token_id"),
        "eos": special.eos if special.eos in ids.get("eos_token_id", []) else first("eos_token_id"),
    }
    own = {role: getattr(special, role) for role in of_files}
    winner, other = (own, of_files) if architecture == "encoder_only" else (of_files, own)
    pad, bos, eos = (other[role] if id is None else id for role, id in winner.items())
    ends = tuple(ids.get("eos_token_id", ()))
    kept = special.files | {file: dict(values) for file, values in files.items()}
    return replace(special, pad=pad, bos=bos, eos=eos, ends=ends, files=kept), notes


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; raise DataError without the file, or for other contents."""
    try:
        values = parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: restore or delete it") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is JSON, but not an object: restore or delete it")
    return values


def _content(token: Any) -> str | None:
    """Return the name of a token: `token`, or its "content" in an object; None for other values."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _are_ids(values: Any, size: int) -> bool:
    return isinstance(values, list) and all(type(i) is int and 0 <= i < size for i in values)
