"""The buffers of a conversation are freed with it."""

import gc
import weakref

import torch

import cats
from cats.decode.cache import SlotCache
from cats.decode.forward import prefill
from cats.decode.state import State
from tests.models import make_ids, make_model


def test_conversation_is_freed_without_the_garbage_collector():
    model = make_model()
    state = State(model, model.config, 1, 16)
    with torch.inference_mode():
        prefill(model, state, make_ids(1, 4), 0)
    known = [weakref.ref(state), weakref.ref(state.cache)]
    gc.disable()
    try:
        del state
        assert [r() for r in known] == [None, None]
    finally:
        gc.enable()


def test_call_leaves_no_cache_behind():
    model = make_model()
    cats.generate(model, make_ids(1, 4), max_new_tokens=3, eos_token_id=None)
    gc.collect()
    kept = {id(o) for o in gc.get_objects() if type(o) is SlotCache}  # by fixtures of other tests
    gc.disable()
    try:
        cats.generate(model, make_ids(1, 4), max_new_tokens=3, eos_token_id=None)
        assert {id(o) for o in gc.get_objects() if type(o) is SlotCache} <= kept
    finally:
        gc.enable()


def test_each_row_is_written_to_its_own_slot():
    cache = SlotCache(make_model().config, 8)
    layer, states = cache.slot_layers[0], torch.randn(3, 1, 1, 4)
    cache.newest, cache.window = torch.tensor([2, 0, 5]), 8
    keys, values = layer.update(states, 2 * states)
    for row, slot in enumerate(cache.newest.tolist()):
        assert torch.equal(keys[row, 0, slot], states[row, 0, 0])
        assert torch.equal(values[row, 0, slot], 2 * states[row, 0, 0])
    assert keys.count_nonzero() == values.count_nonzero() == states.numel()
