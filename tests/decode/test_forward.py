import pytest
import torch
from transformers import LlamaConfig, MistralConfig

import cats
from cats.decode.capture import window_of
from cats.decode.forward import prefill, step_inputs, trace_unmasked, trace_window
from cats.decode.options import resolve
from cats.decode.state import State
from tests.models import make_ids, make_model

# Mean KL divergence, in nats: the first is rounding alone.
KL_LIMIT = {torch.float32: 1e-6, torch.bfloat16: 2e-3}


def sparse(dtype):
    model = make_model().to(dtype)
    cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=0.5))
    return cats.fuse_(model)


def begun(model, ids, length):
    """A conversation whose cache holds all but the newest of the first ``length`` tokens."""
    state = State(model, model.config, len(ids), window_of(128))
    options = resolve(model, length, {"max_new_tokens": 64, "do_sample": False})
    mask = torch.ones_like(ids[:, :length], dtype=torch.bool)
    state.begin(ids[:, :length], mask, 257, options)
    state.advance(prefill(model, state, ids[:, :length], 0), options)
    return state, options


@pytest.mark.parametrize("dtype", KL_LIMIT, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_steps_over_given_tokens_agree_with_one_pass_over_all(dtype, masked):
    model, ids = sparse(dtype), make_ids(1, 120)
    with torch.inference_mode():
        expected = model(ids).logits.float().log_softmax(-1)
        state, options = begun(model, ids, 8)
        step = trace_window(model, state, 256) if masked else trace_unmasked(model, state)
        divergences = []
        for length in range(9, 120):
            state.tokens.copy_(ids[:, length - 1 : length])
            logits = step(*step_inputs(state, None if masked else length))
            actual = logits.float().log_softmax(-1)
            p = expected[:, length - 1]
            divergences.append((p.exp() * (p - actual)).sum())
            state.advance(logits, options)
    assert torch.stack(divergences).mean() < KL_LIMIT[dtype]


def test_step_within_a_short_sliding_window_needs_a_mask():
    model, ids = make_model(MistralConfig, sliding_window=16), make_ids(1, 9)
    with torch.inference_mode():
        state, _ = begun(model, ids, 9)
        assert trace_unmasked(model, state) is None


def test_traced_step_copies_no_weight():
    model, ids = make_model(LlamaConfig), make_ids(1, 9)
    with torch.inference_mode():
        state, _ = begun(model, ids, 9)
        step = trace_unmasked(model, state)
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    held = [t for t in vars(step).values() if isinstance(t, torch.Tensor)]
    held += list(step.parameters()) + list(step.buffers())
    assert held
    assert all(t.data_ptr() in own or t.numel() <= 1 for t in held)
