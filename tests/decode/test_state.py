import torch

from cats.decode.options import resolve
from cats.decode.state import State
from tests.models import make_ids, make_model


def begun(length=5, batch=2, **options):
    """A conversation of rows whose prompts have run, and the options of its answer."""
    model, ids = make_model(), make_ids(batch, length)
    state = State(model, model.config, batch, 16)
    options = resolve(model, length, {"max_new_tokens": 8, "do_sample": False} | options)
    state.begin(ids, torch.ones_like(ids, dtype=torch.bool), 257, options)
    return state, options


def logits_of(*tokens):
    """Logits ``[B, V]`` whose likeliest tokens are these."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), 257).float()


def test_rows_of_different_lengths_move_on_each_from_its_own_slot():
    state, options = begun(eos_token_id=None)
    state.slots.copy_(torch.tensor([3, 9]))
    state.positions.copy_(torch.tensor([[3], [7]]))
    for tokens in ((10, 11), (12, 13), (14, 15)):
        state.advance(logits_of(*tokens), options)
    assert state.slots.tolist() == [6, 12]
    assert state.positions.tolist() == [[6], [10]]
    assert state.tokens.tolist() == [[14], [15]]


def test_tokens_and_logits_are_found_by_the_number_of_the_step():
    state, options = begun(eos_token_id=None)
    state.logits = torch.full((8, 2, 257), torch.nan)
    steps = [(10, 11), (12, 13), (14, 15)]
    state.slots.copy_(torch.tensor([3, 9]))
    for tokens in steps:
        state.advance(logits_of(*tokens), options)
    assert state.step.tolist() == [3]
    assert state.chosen[:3].tolist() == [list(tokens) for tokens in steps]
    assert state.logits[:3].argmax(-1).tolist() == [list(tokens) for tokens in steps]
    assert state.logits[3:].isnan().all()


def test_each_row_ends_by_itself_and_gets_padding():
    state, options = begun(eos_token_id=20, pad_token_id=7)
    for tokens in ((20, 11), (12, 13), (14, 20), (15, 16)):
        state.advance(logits_of(*tokens), options)
    assert state.finished.tolist() == [True, True]
    assert state.chosen[:4].T.tolist() == [[20, 7, 7, 7], [11, 13, 20, 7]]


def test_next_prompt_begins_at_step_0_in_the_same_memory():
    state, options = begun(eos_token_id=None, batch=3)
    buffers = [*state.moving(), state.slots, state.positions, state.step, state.chosen]
    before = [tensor.data_ptr() for tensor in buffers]
    state.advance(logits_of(1, 2, 3), options)
    ids = make_ids(3, 7)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    state.begin(ids, mask, 257, options)
    assert state.step.tolist() == [0]
    assert state.slots.tolist() == [6, 6, 6]
    assert state.positions.tolist() == [[6], [2], [6]]
    after = [*state.moving(), state.slots, state.positions, state.step, state.chosen]
    assert [tensor.data_ptr() for tensor in after] == before
