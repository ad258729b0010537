"""Sessions that join, leave and are cancelled in any order give what each gives alone."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, LlamaConfig, MistralConfig

import cats
from cats.decode.request import Request
from cats.decode.rows.check import checked_rows
from cats.decode.rows.inbox import Inbox
from cats.decode.rows.progress import Progress
from cats.decode.rows.row import Ticket
from cats.decode.rows.scheduler import Scheduler
from tests.models import VOCABULARY, make_ids, make_model

CONTEXT = 64
MODELS = {
    "full": (LlamaConfig, {}),
    "sliding": (MistralConfig, {"sliding_window": 12}),
    "both": (Gemma2Config, {"sliding_window": 12}),
}


@functools.cache
def model_of(kind):
    torch.manual_seed(0)
    config, changes = MODELS[kind]
    return make_model(config, **changes)


@functools.cache
def engine_of(kind, lines):
    return checked_rows(model_of(kind), lines, CONTEXT, rows=lines)


@functools.cache
def alone(kind, seed, length, new, sampled):
    ids = prompt_of(seed, length)
    return cats.generate(model_of(kind), ids, **options_of(seed, new, sampled))[0, length:].tolist()


def prompt_of(seed, length):
    """Prompts with even seeds begin alike."""
    ids = make_ids(1, length, seed)
    if seed % 2 == 0:
        ids[:, : min(length, 18)] = make_ids(1, 18, 99)[:, :length]
    return ids


def options_of(seed, new, sampled):
    options = dict(max_new_tokens=new, eos_token_id=None, do_sample=sampled)
    return options | (dict(seed=seed, temperature=1.5) if sampled else {})


session = st.fixed_dictionaries(
    dict(
        at=st.integers(0, 30),  # the turn in which it is opened
        seed=st.integers(0, 5),
        length=st.sampled_from([1, 2, 7, 17, 19, 40]),
        new=st.sampled_from([1, 2, 9, 24]),
        sampled=st.booleans(),
        cancelled_after=st.sampled_from([None, None, None, 0, 3]),  # turns
    )
)


@pytest.mark.parametrize("kind", MODELS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sessions=st.lists(session, min_size=1, max_size=10),
    rows=st.integers(1, 5),
    lines=st.integers(1, 5),
    lag=st.integers(0, 1),
)
def test_sessions_in_any_order_equal_single_ones(kind, sessions, rows, lines, lag):
    model = model_of(kind)
    engine = engine_of(kind, lines)
    engine.lag = lag
    inbox = Inbox()
    scheduler = Scheduler(engine, inbox, rows=rows, vocabulary=VOCABULARY, longest_wait=1e-9)
    opened = []
    for turn in range(2000):
        for one in sessions:
            if one["at"] == turn:
                ids = prompt_of(one["seed"], one["length"])
                options = options_of(one["seed"], one["new"], one["sampled"])
                request = Request.of(model, model.config, ids, torch.ones_like(ids), options)
                progress = Progress()
                inbox.put(Ticket(request, progress))
                opened.append((turn, one, progress))
        for began, one, progress in opened:
            if one["cancelled_after"] is not None and turn == began + one["cancelled_after"]:
                progress.cancelled = True
        if len(opened) == len(sessions) and all(p.reason for _, _, p in opened):
            break
        if any(p.reason is None for _, _, p in opened):  # an idle scheduler waits
            scheduler.turn()
    for _, one, progress in opened:
        assert progress.error is None
        expected = alone(kind, *(one[name] for name in ("seed", "length", "new", "sampled")))
        if progress.reason == "cancelled":
            assert one["cancelled_after"] is not None
            expected = expected[: len(progress.tokens)]
        assert progress.tokens == expected
    assert not any(line.used for line in scheduler._lines)
