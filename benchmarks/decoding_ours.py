"""The worker for this library's decoding: `python -m benchmarks.decoding_ours SETTING LIBRARY`."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.beside import Setting
from benchmarks.training_ours import about_jax, peak
from benchmarks.worker import Ready, answer_with, samples
from heedful.configs import base
from heedful.train.config import DecodeConfig, MeshConfig
from heedful.train.cpu_allocator import keep_in_place
from heedful.train.inference.generate import Generator
from heedful.train.inference.translate import Translator
from heedful.train.inspection.costs import parts
from heedful.train.sharding import make_mesh
from heedful.train.state import init_params, parameter_count

BEGAN = time.perf_counter()


class Numbers:
    """A tokenizer for texts of token ids; no token ends a text."""

    bos, eos, ends = 0, -1, (-1,)

    def encode_batch(self, texts: Sequence[str], special_tokens: bool = False) -> list[np.ndarray]:
        return [np.array(text.split(), np.int32) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


def prepare(setting: Setting) -> Ready:
    keep_in_place()
    model = base.load(setting.config)[0].model
    model = dataclasses.replace(model, vocab_size=setting.vocab_size, dtype=setting.dtype)
    mesh = make_mesh(MeshConfig())
    params = init_params(model, mesh, 0)
    random, shape = np.random.default_rng(0), (setting.rows, setting.length)
    tokens = random.integers(4, setting.vocab_size, shape, np.int32)
    tokenizer = Numbers()
    positions = setting.rows * setting.length * setting.beam  # All rows fit into one batch.
    if model.architecture == "encoder_decoder":
        extra = setting.steps - setting.length
        decode = DecodeConfig(beam=setting.beam, extra_length=extra, batch_tokens=positions)
        translator = Translator(model, decode, tokenizer, params, mesh)  # type: ignore[arg-type]

        def run() -> int:
            return sum(len(row) for _, row in translator.tokens(dict(enumerate(tokens))))
    else:
        decode = DecodeConfig(beam=setting.beam, max_tokens=setting.steps, batch_tokens=positions)
        generator = Generator(model, decode, tokenizer, params, mesh)  # type: ignore[arg-type]
        prompts = [tokenizer.decode(row[1:]) for row in tokens]

        def run() -> int:
            return sum(len(text.split()) for text in generator(prompts))

    if (written := run()) != setting.rows * setting.steps:
        raise SystemExit(f"{written} tokens instead of {setting.rows} x {setting.steps}")
    start = time.perf_counter() - BEGAN
    keys = setting.length + setting.steps // 2
    flops = sum(part.flops for part in parts(model, params, keys) if part.stack != "encoder")
    return samples(run, peak), {
        "start": start,
        "flops": flops * setting.rows * setting.beam,
        "parameters": parameter_count(params),
        **about_jax(setting.dtype, setting.product),
    }


if __name__ == "__main__":
    answer_with(lambda: prepare(Setting(**json.loads(sys.argv[1]))))
