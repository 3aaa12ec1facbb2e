"""Convert the tokenizer of llama2.c (github.com/karpathy/llama2.c), LLaMA's SentencePiece BPE."""

import json
import struct

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from heedful.data.errors import DataError

SPACE = "\u2581"
"""The character for a space in SentencePiece."""
SPECIAL = ("<unk>", "<s>", "</s>")
"""Names of the first ids; tokenizer.bin has other names for them."""


def read_llama2c(data: bytes, vocab_size: int) -> str:
    """Return the tokenizer.json for a tokenizer.bin with `vocab_size` entries.

    The file has the length of the longest entry (int32), then the score (float32), length in bytes
    (uint32) and UTF-8 text of each entry. Raises DataError for data of another size or format.
    """
    entries, scores, at = [], [], 4
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fI", data, at)
            entries.append(data[at + 8 : at + 8 + length].decode("utf-8").replace(" ", SPACE))
            scores.append(score)
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise DataError(
            f"this is not a tokenizer of llama2.c with {vocab_size} entries ({error}): give the "
            "tokenizer with the vocabulary of the model"
        ) from error
    if at != len(data):
        raise DataError(
            f"the llama2.c tokenizer has {len(data) - at} bytes more than its {vocab_size} "
            "entries: give the tokenizer with the vocabulary of the model"
        )
    entries[: len(SPECIAL)] = SPECIAL
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    merges = []
    # Two entries whose concatenation is an entry are merged, in the order of that entry's score.
    for i in sorted(range(len(entries)), key=lambda i: (-scores[i], i)):
        entry = entries[i]
        if i >= len(SPECIAL) + 256:  # After the special tokens and the bytes.
            pairs = [(entry[:k], entry[k:]) for k in range(1, len(entry))]
            known = [pair for pair in pairs if all(part in vocabulary for part in pair)]
            merges += sorted(known, key=lambda pair: tuple(vocabulary[part] for part in pair))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)
