"""Test that the benchmark of training steps builds models of other libraries by its settings."""

import sys

import pytest
from peer import torch, transformers

from benchmarks import training, training_peers


class Built(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "model"), [("gpt 4x128", "GPT2LMHeadModel"), ("bert base", "BertForMaskedLM")]
)
def test_transformers_drops_as_much_as_the_setting_says(name, model, monkeypatch):
    configs = []

    def build(config):
        configs.append(config.to_dict())
        raise Built

    assert hasattr(transformers, model)  # This may replace the module in sys.modules.
    monkeypatch.setattr(sys.modules["transformers"], model, build)
    monkeypatch.setattr(torch, "set_default_device", lambda device: None)
    setting = training.SETTINGS[name]._replace(dropout=0.3)
    with pytest.raises(Built):
        training_peers.prepare(setting._asdict(), "transformers")
    [config] = configs
    rates = {key: config[key] for key in config if key.endswith(("_pdrop", "_dropout_prob"))}
    assert len(rates) >= 2 and set(rates.values()) == {0.3}
