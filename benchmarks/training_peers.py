"""The worker for steps of peers: `PYTHON -m benchmarks.training_peers SETTING LIBRARY`."""

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from benchmarks.worker import Ready, answer_with, ceiling, highest_resident, samples

BEGAN = time.perf_counter()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {  # layers, heads, width
    "shakespeare_char": (4, 4, 128),
    "shakespeare_char_gpu": (6, 6, 384),
    "gpt2_small": (12, 12, 768),
    "bert_base": (12, 12, 768),
    "vaswani_base": (6, 8, 512),
}


class Translator(nn.Module):
    """torch.nn.Transformer with one matrix of embeddings for inputs and head, as in the paper."""

    def __init__(self, layers: int, heads: int, width: int, vocab_size: int, dropout: float):
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(1024, width), requires_grad=False)
        self.core = nn.Transformer(
            width, heads, layers, layers, 4 * width, dropout, batch_first=True
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        put = lambda x: self.drop(self.table(x) * 16 + self.positions[: x.shape[1]])  # noqa: E731
        hidden = self.core(put(source), put(target), tgt_mask=causal, tgt_is_causal=True)
        return hidden @ self.table.weight.T


def prepare(given: dict[str, Any], library: str) -> Ready:
    layers, heads, width = SIZES[given["config"]]
    length, vocab_size, dropout = given["length"], given["vocab_size"], given["dropout"]
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    x, y, source = torch.randint(0, vocab_size, (3, given["rows"], length))
    if given["targets"]:
        # cross_entropy ignores the target -100.
        y[torch.rand(y.shape).argsort(1) >= given["targets"]] = -100
    cross_entropy = lambda z: nn.functional.cross_entropy(z.flatten(0, 1), y.flatten())  # noqa: E731
    if library.startswith("nanogpt"):
        sys.path.insert(0, os.environ["NANOGPT"])
        import model as nanogpt  # type: ignore[import-not-found]

        config = nanogpt.GPTConfig(
            block_size=length,
            vocab_size=vocab_size,
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            dropout=dropout,
            bias=given["config"] == "gpt2_small",
        )
        model = nanogpt.GPT(config)
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), DEVICE)
        network = torch.compile(model) if library.endswith("compiled") else model
        loss = lambda: network(x, y)[1]  # noqa: E731
    elif given["config"] == "vaswani_base":
        model = Translator(layers, heads, width, vocab_size, dropout)
        optimizer = torch.optim.Adam(model.parameters(), 1e-4)
        loss = lambda: cross_entropy(model(source, x))  # noqa: E731
    else:
        import transformers

        if given["config"] == "bert_base":
            config = transformers.BertConfig(
                vocab_size=vocab_size,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
            model: Any = transformers.BertForMaskedLM(config)
        else:
            config = transformers.GPT2Config(
                vocab_size=vocab_size,
                n_positions=length,
                n_embd=width,
                n_layer=layers,
                n_head=heads,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
            )
            model = transformers.GPT2LMHeadModel(config)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        loss = lambda: cross_entropy(model(x).logits)  # noqa: E731
    model.train()
    dtype = getattr(torch, given["dtype"])
    cast = torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32)

    def run(steps: int = given["steps"]) -> None:
        value = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with cast:
                value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        value.item()

    run(3)
    start = time.perf_counter() - BEGAN
    return samples(run, peak), {"start": start} | about_torch(dtype, given["product"])


def about_torch(dtype: torch.dtype, size: int) -> dict[str, Any]:
    """Return the ceiling and the installed versions of a peer."""
    large = torch.ones(size, size, dtype=dtype)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    best = ceiling(lambda: (large @ large)[0, 0].item(), size)
    return {"ceiling": best, "versions": versions}


def peak() -> int:
    """Return the peak memory in bytes, of the device if it has its own memory."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else highest_resident()


if __name__ == "__main__":
    answer_with(lambda: prepare(json.loads(sys.argv[1]), sys.argv[2]))
