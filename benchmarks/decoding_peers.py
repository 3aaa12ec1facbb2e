"""The worker for transformers: `PYTHON -m benchmarks.decoding_peers SETTING LIBRARY`."""

import json
import sys
import time
from typing import Any

import torch
import transformers

from benchmarks.training_peers import DEVICE, about_torch, peak
from benchmarks.worker import Ready, answer_with, samples

BEGAN = time.perf_counter()


def prepare(given: dict[str, Any]) -> Ready:
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    dtype = getattr(torch, given["dtype"])
    rows, length, vocab_size, new = (given[k] for k in ("rows", "length", "vocab_size", "steps"))
    if given["config"] == "gpt2_small":
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab_size))
    else:
        config = transformers.MarianConfig(
            vocab_size=vocab_size,
            d_model=512,
            encoder_layers=6,
            decoder_layers=6,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            encoder_ffn_dim=2048,
            decoder_ffn_dim=2048,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
        model = transformers.MarianMTModel(config)
    model.to(dtype).eval()
    tokens = torch.randint(4, vocab_size, (rows, length))
    search = {"num_beams": given["beam"], "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                **search,
            )

    before = 1 if model.config.is_encoder_decoder else length
    written = run().shape[1] - before
    if written != new:
        raise SystemExit(f"{written} tokens instead of {new}")
    start = time.perf_counter() - BEGAN
    return samples(run, peak), {"start": start} | about_torch(dtype, given["product"])


if __name__ == "__main__":
    answer_with(lambda: prepare(json.loads(sys.argv[1])))
