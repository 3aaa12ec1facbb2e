"""Decoding against `generate` of transformers, on the same cores in the same run.

python -m venv /tmp/peers
/tmp/peers/bin/python -m pip install -r benchmarks/peers.txt
python -m benchmarks.decoding --peers /tmp/peers/bin/python

Both libraries have models of the same sizes with random parameters, the same type (float32 on a
CPU, bfloat16 on a GPU) and a cache. A GPT-2 continues prompts greedily, and an encoder-decoder of
the size of the Transformer base (transformers: Marian) translates with a beam of 4. No text ends
early, so that both write the same number of tokens. The time includes the prefill of prompts and
the encoding of sources. For this library it also includes the work of `heedful generate` and
`heedful translate` around decoding: making batches, and converting tokens to texts. A step decodes
one token in each row.
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
