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
    gc.disable()
    try:
        cats.generate(model, make_ids(1, 4), max_new_tokens=3, eos_token_id=None)
        assert not [o for o in gc.get_objects() if type(o) is SlotCache]
    finally:
        gc.enable()
