"""Sessions of models whose rows cannot run together: ends, seeds, what is open at a close."""

import time

import pytest
import torch
from transformers import LlamaConfig

import cats
from cats.errors import BackendError
from tests.models import make_model

ENDLESS = dict(eos_token_id=None)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*cannot be traced", "ignore:sessions of .* run one after the other"
)


@pytest.fixture(scope="module")
def dynamic():
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return make_model(LlamaConfig, rope_parameters=rope)


def test_closing_ends_the_running_answer_after_its_current_token(dynamic):
    sessions = cats.Sessions(dynamic, context=500)
    running = sessions.open([1], max_new_tokens=490, **ENDLESS)
    waiting = sessions.open([2], max_new_tokens=490, **ENDLESS)
    next(running.tokens())
    sessions.close()
    assert (running.reason, waiting.reason) == ("cancelled", "cancelled")
    assert len(running.so_far()) < 490


def test_a_waiting_session_that_is_cancelled_ends_at_once(dynamic):
    with cats.Sessions(dynamic, context=500) as sessions:
        running = sessions.open([1], max_new_tokens=490, **ENDLESS)
        next(running.tokens())
        waiting = sessions.open([2], max_new_tokens=490, **ENDLESS)
        waiting.cancel()
        assert waiting.result(10).reason == "cancelled"
        assert running.reason is None


def test_draws_without_a_seed_are_those_of_torch_where_the_session_was_opened(dynamic):
    tokens = []
    with cats.Sessions(dynamic, context=64) as sessions:
        for _ in range(2):
            torch.manual_seed(3)
            session = sessions.open([1], max_new_tokens=12, do_sample=True, **ENDLESS)
            torch.rand(5)  # the thread of the sessions draws from no generator of others
            tokens.append((session.result(10).tokens, torch.rand(1)))
    assert tokens[0] == tokens[1]


def test_an_exit_in_a_session_ends_all_of_them(dynamic):
    def leave(ids, scores):
        raise SystemExit

    sessions = cats.Sessions(dynamic, context=64)
    bad = sessions.open([1], stopping_criteria=[leave])
    waiting = sessions.open([2], max_new_tokens=20, **ENDLESS)
    with pytest.raises(SystemExit):
        bad.result(10)
    with pytest.raises(SystemExit):
        waiting.result(10)
    deadline = time.monotonic() + 10
    while sessions._thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(BackendError, match="ended with an error"):
        sessions.open([3])
