import pytest
import torch

from cats.benchmarks import shapes
from cats.benchmarks.model import VARIANTS, Case, measure
from cats.errors import ConfigError

MLP_SIZES = dict(hidden_size=32, intermediate_size=64)
TINY = MLP_SIZES | dict(
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64
)


def test_prefill_and_decode_of_every_variant_are_timed(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    model = dict(shape="tiny", layers=1, dtype=torch.float32, device="cpu")
    case = Case(**model, prefill=16, new_tokens=32, caches=("dynamic",), rounds=2)
    results = list(measure(case))
    timed = [(r.quantity, r.settings["variant"]) for r in results]
    assert timed == [(quantity, v) for quantity in ("prefill", "decode") for v in VARIANTS]
    assert all(r.value > 0 and r.settings["layers"] == 1 for r in results)


def test_unknown_shape_is_an_error():
    with pytest.raises(ConfigError, match="llama-2-7b"):
        list(measure(Case(shape="llama-9", device="cpu")))
