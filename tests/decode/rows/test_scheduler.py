"""Who runs when: an engine that computes nothing, turn by turn, with a clock of its own."""

from itertools import pairwise

import pytest

from cats.errors import BackendError, ConfigError, UnsupportedModelError
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


class Processor:
    """Takes the scores as they are, and raises at a length, as one that knows no such text."""

    def __init__(self, length):
        self.length = length

    def begin(self, ids, mask):
        self.count = ids.shape[1]

    def scores(self, logits):
        if self.count == self.length:
            raise KeyError(self.length)
        return logits

    def add(self, tokens):
        self.count += 1


@pytest.mark.parametrize("lag", [0, 1])
def test_what_is_raised_after_the_end_of_a_session_does_not_count(lag):
    driven = Driven(FakeEngine(lag=lag))
    # the token 5 is chosen from 4 tokens, and ends the session
    session = driven.open([1, 2, 3], new=9, eos_token_ids=(4,), processors=Processor(5))
    driven.finish(session)
    assert (session.reason, session.tokens) == ("stop", [3, 4])


@pytest.mark.parametrize("lag", [0, 1])
def test_an_error_comes_after_the_tokens_before_it(lag):
    driven = Driven(FakeEngine(lag=lag))
    session = driven.open([1, 2, 3], new=9, processors=Processor(6))
    driven.finish(session)
    assert (session.reason, session.tokens) == ("error", [3, 4, 5])


def test_a_step_that_fails_after_the_end_of_a_session_does_not_count():
    driven = Driven(FakeEngine(lag=1))
    session = driven.open([1, 2, 3], new=9, eos_token_ids=(4,))
    driven.turn()  # has chosen 3 and 4, and the host has read 3
    driven.engine.broken.add(1)
    driven.finish(session)
    assert (session.reason, session.tokens) == ("stop", [3, 4])


def test_steps_run_the_lines_in_order():
    driven = Driven(FakeEngine(lines=3), rows=3)
    sessions = [driven.open([i], new=9 if i else 3) for i in range(3)]
    driven.finish(sessions[0])
    sessions.append(driven.open([5]))  # gets the line of the first
    driven.finish(*sessions)
    assert (5, 1, 2) in steps(driven.engine.log)
    assert (1, 2, 5) not in steps(driven.engine.log)


def test_what_on_change_raises_ends_its_own_session_only():
    def on_change():
        raise RuntimeError("Event loop is closed")

    driven = Driven(FakeEngine())
    good = driven.open([1], new=9)
    bad = driven.open([2], new=9, on_change=on_change)
    waiting = driven.open([3], on_change=on_change)
    driven.finish(good, bad)
    assert (good.reason, bad.reason) == ("length", "error")
    assert str(bad.error) == "Event loop is closed"
    driven.inbox.close()
    driven.scheduler.run()
    assert waiting.reason is not None


# --- waiting


def test_prompts_that_fail_do_not_make_pieces_longer():
    engine = FakeEngine(capacity=4000, lines=2)
    driven = Driven(engine, rows=2)
    engine.broken.add(7)
    for length in (10, 30, 100, 300, 1000, 3000):
        driven.finish(driven.open([7] * length))
    running = driven.open([1], new=400)
    driven.turn()
    long = driven.open([2] * 3000, new=2)
    while not long.tokens:
        start, before = engine.now, len(running.tokens)
        driven.turn()
        assert engine.now - start <= 0.05 + engine.per_step
        assert len(running.tokens) == before + 1


def test_sessions_that_come_together_are_admitted_within_the_bound():
    class Slow(FakeEngine):
        def clear(self, line, start, stop):
            self.now += 0.01

    engine = Slow(lines=16)
    driven = Driven(engine, rows=16)
    running = driven.open([1], new=60)
    driven.turn()
    sessions = [driven.open([i + 2], new=2) for i in range(15)]
    while not all(session.tokens for session in sessions):
        start, before = engine.now, len(running.tokens)
        driven.turn()
        assert engine.now - start <= 0.05 + engine.per_step + 0.01
        assert len(running.tokens) == before + 1


def test_the_model_is_compared_once_for_all_sessions_that_come_together():
    asked = []
    driven = Driven(FakeEngine(lines=16), rows=16, change=lambda: asked.append(1))
    for i in range(16):
        driven.open([i])
    driven.turn()
    assert len(asked) == 1


def test_a_long_prompt_delays_a_short_one_that_comes_later_by_one_second_at_most():
    engine = FakeEngine(capacity=9000)
    driven = Driven(engine)
    driven.finish(driven.open([9] * 100, new=1))
    driven.open([1] * 8000)
    driven.turn(5)
    start, short = engine.now, driven.open([2] * 8)
    while not short.tokens:
        driven.turn()
    assert engine.now - start < 1


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
    driven = Driven(FakeEngine(capacity=200), change=lambda: changes.pop() if changes else None)
    prompt = [*range(1, 40)]
    driven.finish(driven.open(prompt))
    changes.append("content")
    again = driven.open(prompt)
    driven.finish(again)
    assert again.reused == 0


def test_a_change_of_structure_makes_another_engine_once_the_rows_have_ended():
    changes, engines = [], []

    def make_engine():
        assert driven.engine.freed  # two caches at a time may not fit
        engines.append(FakeEngine(lines=2, capacity=200))
        return engines[-1]

    driven = Driven(
        FakeEngine(capacity=200),
        change=lambda: changes.pop() if changes else None,
        make_engine=make_engine,
    )
    prompt = [*range(1, 40)]
    running = driven.open(prompt, new=9)
    driven.turn(2)
    changes.append("structure")
    later = driven.open(prompt)
    driven.turn()
    assert (running.reason, later.tokens, engines) == (None, [], [])
    assert ("forget",) in driven.engine.log
    driven.finish(running, later)
    assert (later.tokens, later.reused) == (expected(prompt), 0)
    assert prefills(engines[0].log)
    assert ("step", 1) in driven.engine.log


def test_a_model_that_no_engine_takes_any_more_ends_sessions_with_the_reason():
    def make_engine():
        if wrong:
            raise UnsupportedModelError(wrong[0])
        return FakeEngine()

    changes, wrong = ["structure"], ["it has other layers now"]
    driven = Driven(
        FakeEngine(), change=lambda: changes.pop() if changes else None, make_engine=make_engine
    )
    first, second = driven.open([1]), driven.open([2])
    driven.finish(first, second)
    assert (first.reason, second.reason) == ("error", "error")
    assert "other layers" in str(first.error)
    wrong.clear()
    third = driven.open([3])
    driven.finish(third)
    assert third.tokens == expected([3])


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


def test_the_first_token_of_a_prompt_does_not_wait_for_a_step():
    driven, seen = Driven(FakeEngine()), []
    session = driven.open([1, 2])
    step = driven.engine.step
    driven.engine.step = lambda rows: (seen.append(list(session.tokens)), step(rows))[1]
    driven.turn()
    assert seen == [[2]]


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


@pytest.mark.parametrize("lag", [0, 1])
def test_at_most_one_row_is_counted_in_a_step_and_each_gets_its_turn(lag):
    engine = FakeEngine(lines=16, capacity=200, lag=lag)
    driven = Driven(engine, rows=16)
    old = driven.open([99], new=90, count_reads=True)
    driven.turn(3)
    sessions = [driven.open([i], new=60, count_reads=True) for i in range(12)]
    while not all(session.reason for session in sessions):
        engine.log.clear()
        driven.turn()
        assert [entry[0] for entry in engine.log].count("counted") <= 1
    assert all(len(session.reads) >= 3 for session in (old, *sessions))


def test_an_idle_scheduler_keeps_nothing_of_ended_sessions():
    driven = Driven(FakeEngine(lag=1))
    session = driven.open([1], new=9, eos_token_ids=(2,))
    driven.finish(session)
    driven.inbox.close()
    driven.turn()
    assert not driven.scheduler._unread
