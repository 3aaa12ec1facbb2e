"""Decoding beside `generate` of transformers, on the same cores in the same run.

python -m venv /tmp/peers
/tmp/peers/bin/python -m pip install -r benchmarks/peers.txt
python -m benchmarks.decoding --peers /tmp/peers/bin/python

The same sizes with random parameters and one type for all (float32 on a CPU, bfloat16 on a GPU),
with a cache: a GPT-2 goes on greedily
with prompts, and an encoder-decoder of the size of the Transformer base (transformers: Marian)
translates with a beam of 4. Nothing ends a text early, so that all write the same number of tokens;
prompts are read and sources encoded within the time. Here the work includes what `heedful generate`
and `heedful translate` do around it: batches, and texts of tokens. A step is one token of all rows.
"""

from collections.abc import Sequence

from benchmarks import beside
from benchmarks.beside import ON_GPU, Setting

PEERS = ("transformers",)
SETTINGS = {
    "gpt2 124M, 1 row": Setting("gpt2_small", 1, 64, 50_257, 64, PEERS, beam=1),
    "gpt2 124M, 8 rows": Setting("gpt2_small", 8, 64, 50_257, 64, PEERS, beam=1),
    "gpt2 124M, 8 long rows": Setting("gpt2_small", 8, 512, 50_257, 64, PEERS, beam=1),
    "transformer base, beam 4, 1 row": Setting("vaswani_base", 1, 32, 37_000, 33, PEERS, beam=4),
    "transformer base, beam 4, 16 rows": Setting("vaswani_base", 16, 32, 37_000, 33, PEERS, beam=4),
    "gpu gpt2 124M, 1 row": Setting("gpt2_small", 1, 64, 50_257, 256, PEERS, beam=1, **ON_GPU),
    "gpu gpt2 124M, 64 rows": Setting("gpt2_small", 64, 64, 50_257, 256, PEERS, beam=1, **ON_GPU),
    "gpu transformer base, beam 4": Setting(
        "vaswani_base", 64, 32, 37_000, 33, PEERS, beam=4, **ON_GPU
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    beside.main("decoding", __doc__, SETTINGS, argv)


if __name__ == "__main__":
    main()
