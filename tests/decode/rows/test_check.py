"""Rows of different lengths give what single rows give, or are refused."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, MistralConfig, Phi3Config

from cats.decode.rows import traced
from cats.decode.rows.check import checked_rows, difference_from_single_rows
from cats.decode.rows.masks import Masks
from cats.errors import UnsupportedModelError
from tests.models import FAMILIES, make_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", FAMILIES)
def test_rows_of_every_family_equal_single_rows(config, attention):
    model = make_model(config)
    if model.config.model_type != "gemma2":  # it caps scores, which sdpa does not
        model.set_attn_implementation(attention)
    engine = checked_rows(model, 3, 64, rows=3)
    with torch.inference_mode():
        assert difference_from_single_rows(engine, engine.logits, 3) < 1e-5


@pytest.mark.parametrize("config", FAMILIES)
def test_traced_rows_of_every_family_equal_single_rows(config):
    model = make_model(config, sliding_window=16) if config is MistralConfig else make_model(config)
    engine = checked_rows(model, 5, 96, rows=5)
    if model.config.model_type == "gemma2":  # its attention repeats keys, so it needs the length
        assert engine.traced.logits([0], [3], torch.tensor([1]), 4) is None
        return
    with torch.inference_mode():
        for count in (1, 2, 3, 5):
            assert difference_from_single_rows(engine, engine.traced.logits, count) < 1e-5


def test_a_wrong_trace_is_not_used(monkeypatch):
    def wrong(graph):
        return lambda *inputs: 1.1 * graph(*inputs)

    monkeypatch.setattr(traced, "use_cpu_kernels", wrong)
    with pytest.warns(UserWarning, match="its logits differ by 10.0%"):
        engine = checked_rows(make_model(), 2, 64, rows=2)
    assert engine.traced.logits([0], [3], torch.tensor([1]), 4) is None


@pytest.mark.parametrize("config", [MistralConfig, Phi3Config])
def test_a_sliding_window_hides_what_lies_before_it(config, monkeypatch):
    model = make_model(config, sliding_window=16)
    checked_rows(model, 3, 96, rows=3)
    monkeypatch.setattr(
        Masks, "span", property(lambda self: 17, lambda self, value: None), raising=False
    )
    with pytest.raises(UnsupportedModelError, match="differs from single rows"):
        checked_rows(model, 3, 96, rows=3)


def test_a_check_leaves_the_cache_empty():
    engine = checked_rows(make_model(), 2, 64, rows=2)
    assert all(not buffer.any() for buffer in engine.cache.buffers())


def test_the_check_does_not_run_hooks_of_the_user():
    model, calls = make_model(), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    checked_rows(model, 2, 64, rows=2)
    assert not calls


class PositionBlind(nn.Module):
    """Ignores the positions that it is given, as if all rows had the length of the first."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, position_ids):
        return self.inner(x, position_ids[:1].expand_as(position_ids))


def test_a_model_that_has_one_position_for_all_rows_is_refused():
    model = make_model()
    model.model.rotary_emb = PositionBlind(model.model.rotary_emb)
    with pytest.raises(UnsupportedModelError, match="differs from single rows by"):
        checked_rows(model, 2, 64, rows=2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary"),
        ({"layer_types": ["chunked_attention"] * 2, "attention_chunk_size": 16}, "chunked_att"),
    ],
)
def test_what_rows_cannot_do_is_refused_with_the_reason(changes, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        checked_rows(make_model(LlamaConfig, **changes), 2, 64, rows=2)


def test_a_model_with_learned_positions_takes_rows():
    engine = checked_rows(make_model(GPT2Config, n_embd=16, n_head=2, n_layer=2), 3, 64, rows=3)
    with torch.inference_mode():
        assert difference_from_single_rows(engine, engine.logits, 3) < 1e-5
