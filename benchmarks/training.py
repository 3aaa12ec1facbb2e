"""Training steps against those of other libraries, on the same cores in the same run.

python -m venv /tmp/peers
/tmp/peers/bin/python -m pip install -r benchmarks/peers.txt
git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
git clone https://github.com/google/flax /tmp/flax
python -m benchmarks.training --peers /tmp/peers/bin/python --nanogpt /tmp/nanoGPT --flax /tmp/flax

All libraries have the same model, batch and type, random tokens, gradients clipped at 1, and AdamW
(Adam for the translation). BERT has 15 % of its tokens as targets; transformers computes logits for
the others as well. nanoGPT runs as it is and with torch.compile. GPT-2 and BERT of transformers and
torch.nn.Transformer run in a plain loop, and the models of Flax's examples lm1b and wmt run as in
their train.py. A library is skipped without its option. A sample is the mean of some steps, after
three steps to warm up.

The utilisation is the rate of the model's floating-point operations, relative to the best rate at
which a library multiplied two square matrices in the same run, of 2,048 rows on a CPU and 8,192 on
a GPU. Causal attention counts half, because of its mask, and the head counts for targets only.

A CPU computes in float32. On a GPU settings are larger and have no dropout; they compute in
bfloat16 with parameters in float32 (torch: by autocast), and this library uses cuDNN's attention.
With --profile the time of each of its operations is kept, and the longest are listed.
"""

from collections.abc import Sequence

from benchmarks import beside
from benchmarks.beside import ON_GPU, Setting

GPT = ("nanogpt", "nanogpt compiled", "transformers", "flax lm1b")
BERT, TRANSLATION = ("transformers",), ("torch.nn.Transformer", "flax wmt")
SETTINGS = {
    "gpt 4x128": Setting("shakespeare_char", 12, 64, 65, 30, GPT),
    "gpt 6x384": Setting("shakespeare_char_gpu", 12, 256, 65, 2, GPT),
    "gpt2 124M": Setting("gpt2_small", 2, 1024, 50_304, 1, GPT),
    "bert base": Setting("bert_base", 8, 128, 30_522, 2, BERT, dropout=0.1, targets=19),
    "transformer base": Setting("vaswani_base", 16, 64, 37_000, 2, TRANSLATION, dropout=0.1),
}
ON_A_GPU = {
    "gpu gpt 6x384": Setting("shakespeare_char_gpu", 64, 256, 65, 50, GPT[:3]),
    "gpu gpt2 124M": Setting("gpt2_small", 32, 1024, 50_304, 20, GPT[:3]),
    "gpu bert base": Setting("bert_base", 128, 128, 30_522, 20, BERT, targets=19),
    "gpu transformer base": Setting("vaswani_base", 192, 128, 37_000, 20, TRANSLATION[:1]),
}
SETTINGS |= {key: value._replace(core="cudnn", **ON_GPU) for key, value in ON_A_GPU.items()}


def main(argv: Sequence[str] | None = None) -> None:
    beside.main("training", __doc__, SETTINGS, argv)


if __name__ == "__main__":
    main()
