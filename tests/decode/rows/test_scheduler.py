"""Who runs when: an engine that computes nothing, turn by turn, with a clock of its own."""

from itertools import pairwise

import pytest

from cats.errors import BackendError, ConfigError
from tests.decode.rows.fakes import Driven, FakeEngine, expected


def steps(log):
    return [entry[1:] for entry in log if entry[0] == "step"]


def prefills(log):
    return [entry[1:] for entry in log if entry[0] == "prefill"]


@pytest.mark.parametrize("lag", [0, 1])
def test_sessions_join_and_leave_between_steps(lag):
    driven = Driven(FakeEngine(lag=lag))
    first = driven.open([1, 2, 3], new=6)
    driven.turn(2)
    second = driven.open([5] * 9, new=2)
    driven.finish(first, second)
    assert first.tokens == expected([1, 2, 3], 6)
    assert second.tokens == expected([5] * 9, 2)
    assert first.reason == second.reason == "length"
    assert (1, 5) in steps(driven.engine.log)


@pytest.mark.parametrize("lag", [0, 1])
def test_no_row_is_stepped_beyond_its_last_token(lag):
    driven = Driven(FakeEngine(lag=lag))
    driven.finish(driven.open([1], new=5))
    assert len(steps(driven.engine.log)) == 4


def test_an_end_token_ends_a_session_and_frees_its_line():
    driven = Driven(FakeEngine(lines=1, lag=1), rows=1)
    first = driven.open([1, 2], new=20, eos_token_ids=(4,))
    second = driven.open([3])
    driven.finish(first, second)
    assert (first.tokens, first.reason) == ([2, 3, 4], "stop")
    assert second.tokens == expected([3])


def test_sessions_are_admitted_in_the_order_in_which_they_came():
    driven = Driven(FakeEngine(lines=2), rows=2)
    sessions = [driven.open([i + 1], new=3) for i in range(6)]
    ended = []
    while len(ended) < 6:
        driven.turn()
        ended += [i for i, s in enumerate(sessions) if s.reason and i not in ended]
    assert ended == [0, 1, 2, 3, 4, 5]
    assert max(len(rows) for rows in steps(driven.engine.log)) == 2


def test_the_cache_may_hold_fewer_sessions_than_rows():
    driven = Driven(FakeEngine(lines=1), rows=4)
    driven.finish(*[driven.open([i + 1]) for i in range(3)])
    assert max(len(rows) for rows in steps(driven.engine.log)) == 1


def test_running_rows_wait_for_a_long_prompt_no_longer_than_the_bound():
    engine = FakeEngine(capacity=4000)
    driven = Driven(engine)
    running = driven.open([1], new=400)
    driven.turn(2)
    long = driven.open([2] * 3000, new=2)
    times = []
    while not long.tokens:
        before = len(running.tokens)
        driven.turn()
        assert len(running.tokens) == before + 1
        times.append(engine.now)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert max(gaps) <= 0.05 + engine.per_step
    # and it is used: 3000 tokens take 3 seconds
    assert len(times) < 3 / (0.05 * 0.7)


def test_many_short_prompts_at_once_delay_the_others_no_longer_than_the_bound():
    engine = FakeEngine(lines=16, per_token=5e-3)
    driven = Driven(engine, rows=16)
    running = driven.open([1], new=60)
    driven.turn(3)
    sessions = [driven.open([i + 2] * 4) for i in range(15)]
    while not all(session.tokens for session in sessions):
        start, before = engine.now, len(running.tokens)
        driven.turn()
        assert len(running.tokens) == before + 1
        assert engine.now - start <= 0.05 + engine.per_step


def test_prompts_take_turns():
    driven = Driven(FakeEngine(capacity=1000))
    driven.open([9], new=900)
    driven.turn()
    long, short = driven.open([1] * 600), driven.open([2] * 30)
    driven.finish(short)
    assert not long.tokens


def test_a_cancelled_session_leaves_and_the_others_go_on():
    driven = Driven(FakeEngine(lines=2), rows=2)
    first, second = driven.open([1], new=9), driven.open([2], new=9)
    waiting = driven.open([3])
    driven.turn(3)
    first.cancelled = waiting.cancelled = True
    driven.turn()
    assert (first.reason, waiting.reason, second.reason) == ("cancelled", "cancelled", None)
    assert first.tokens == expected([1], len(first.tokens))
    driven.finish(second)
    assert second.tokens == expected([2], 9)


def test_a_session_that_is_cancelled_within_its_prompt_leaves():
    driven = Driven(FakeEngine(capacity=1000))
    driven.open([9], new=900)
    driven.turn()
    session = driven.open([1] * 900)
    driven.turn(2)
    session.cancelled = True
    driven.turn()
    assert (session.reason, session.tokens) == ("cancelled", [])
    count = len(prefills(driven.engine.log))
    driven.turn(3)
    assert len(prefills(driven.engine.log)) == count


@pytest.mark.parametrize("lag", [0, 1])
def test_a_step_that_fails_ends_only_the_guilty_rows(lag):
    driven = Driven(FakeEngine(lag=lag))
    sessions = {i: driven.open([i], new=9) for i in (1, 2, 3)}
    driven.turn(3)
    driven.engine.broken.add(2)
    driven.finish(*sessions.values())
    assert sessions[2].reason == "error"
    assert str(sessions[2].error) == "broken step"
    for i in (1, 3):
        assert (sessions[i].reason, sessions[i].tokens) == ("length", expected([i], 9))


def test_a_prompt_that_fails_ends_only_its_session():
    driven = Driven(FakeEngine())
    driven.engine.broken.add(2)
    good, bad = driven.open([1]), driven.open([2])
    driven.finish(good, bad)
    assert (good.reason, bad.reason) == ("length", "error")


def test_a_criterion_that_raises_ends_only_its_session():
    def criterion(ids, scores):
        raise KeyError("criterion")

    driven = Driven(FakeEngine())
    good, bad = driven.open([1]), driven.open([2], stopping_criteria=(criterion,))
    driven.finish(good, bad)
    assert isinstance(bad.error, KeyError)
    assert good.reason == "length"


# --- prefixes


def ran(log, first):
    """Tokens of the prompts that begin with this token that were run."""
    return sum(count for token, _, count in prefills(log) if token == first)


def test_a_prompt_that_continues_an_ended_session_runs_only_what_is_new():
    driven = Driven(FakeEngine(capacity=200))
    prompt = [*range(1, 40)]
    first = driven.open(prompt, new=5)
    driven.finish(first)
    second = driven.open([*prompt, *first.tokens, 7, 8])
    driven.finish(second)
    # the last token of an answer is not in the cache
    assert second.reused == len(prompt) + 4
    assert ran(driven.engine.log, 1) == len(prompt) + 3


def test_a_prompt_that_begins_like_a_running_session_copies_its_slots():
    driven = Driven(FakeEngine(capacity=200))
    shared = [*range(1, 50)]
    first = driven.open([*shared, 5], new=50)
    driven.turn(3)
    second = driven.open([*shared, 6, 7])
    driven.finish(second)
    assert ("copy", 0, 1, 0, 49) in driven.engine.log
    assert second.reused == 49
    assert ran(driven.engine.log, 1) == 50 + 2
    driven.finish(first)


def test_prompts_that_begin_alike_and_come_together_run_their_beginning_once():
    driven = Driven(FakeEngine(capacity=200, lines=8), rows=8)
    shared = [*range(1, 101)]
    sessions = [driven.open([*shared, 900 + i]) for i in range(8)]
    driven.finish(*sessions)
    assert ran(driven.engine.log, 1) == 100 + 8
    assert [s.tokens for s in sessions] == [expected([*shared, 1])] * 8


def test_the_same_prompt_again_runs_its_last_token():
    driven = Driven(FakeEngine(lines=1))
    prompt = [*range(1, 30)]
    for _ in range(2):
        session = driven.open(prompt, new=1)
        driven.finish(session)
    assert session.tokens == expected(prompt, 1)
    assert prefills(driven.engine.log)[-1] == (1, 28, 1)


def test_a_session_that_waits_for_anothers_beginning_runs_if_that_one_fails():
    driven = Driven(FakeEngine(capacity=200))
    shared = [*range(1, 101)]
    first, second = driven.open([*shared, 5]), driven.open([*shared, 6])
    first.cancelled = True
    driven.finish(second)
    assert second.tokens == expected([*shared, 6])


def test_after_a_change_of_the_model_nothing_is_reused():
    changes = []
    driven = Driven(FakeEngine(capacity=200), has_changed=lambda: bool(changes and changes.pop()))
    prompt = [*range(1, 40)]
    driven.finish(driven.open(prompt))
    changes.append(True)
    again = driven.open(prompt)
    driven.finish(again)
    assert again.reused == 0


# --- the end


def test_closing_cancels_all_sessions():
    driven = Driven(FakeEngine(lines=1), rows=1)
    running, waiting = driven.open([1], new=30), driven.open([2])
    driven.turn(2)
    driven.inbox.close()
    driven.scheduler.run()
    assert (running.reason, waiting.reason) == ("cancelled", "cancelled")
    with pytest.raises(ConfigError, match="closed"):
        driven.open([3])


def test_an_error_of_the_scheduler_itself_ends_all_sessions_with_it():
    class Wrong(FakeEngine):
        def step(self, rows):
            return super().step(rows)[:-1]  # fewer tokens than rows

    driven = Driven(Wrong())
    session = driven.open([1])
    driven.scheduler.run()
    assert session.reason == "error"
    assert isinstance(session.error, ValueError)
    with pytest.raises(BackendError, match="ended with an error"):
        driven.open([2])


# --- counted steps


def test_every_eighth_step_of_a_session_that_counts_reads_runs_by_itself():
    driven = Driven(FakeEngine())
    counting = driven.open([1, 2], new=12, count_reads=True)
    other = driven.open([7, 8], new=12)
    driven.finish(counting, other)
    assert counting.tokens == other.tokens == expected([1, 2], 12)
    assert counting.reads == [(2, 0.5), (10, 0.5)]
    assert other.reads == []
    assert driven.engine.log.count(("counted", 1)) == 2
    assert ("step", 7) in driven.engine.log


def test_a_counted_step_that_fails_ends_only_its_own_session():
    driven = Driven(FakeEngine())
    counting = driven.open([1, 2], count_reads=True)
    other = driven.open([7, 8])
    driven.turn()
    driven.engine.broken.add(1)
    driven.finish(counting, other)
    assert (counting.reason, other.reason) == ("error", "length")
