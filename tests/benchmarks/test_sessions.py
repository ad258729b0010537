import pytest
import torch

from cats.benchmarks.decode_bytes import bytes_of_rows, slot_bytes
from cats.benchmarks.decode_case import Case as DecodeCase
from cats.benchmarks.decode_rows import measure_rows
from cats.benchmarks.sessions import Case, _rate, arrivals, measure
from cats.benchmarks.sparse_copies import models_of
from cats.errors import ConfigError
from cats.metrics import read_shares, realized_sparsity
from cats.model import traffic
from cats.report.sessions import tables
from cats.results import Result
from tests.models import make_ids, make_model

TINY = dict(
    model="tiny",
    sessions=5,
    seconds=0.2,
    rows=3,
    shortest_prompt=4,
    longest_prompt=20,
    fewest_tokens=3,
    most_tokens=9,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model()


def test_sessions_are_measured_at_random_times_and_at_once(model):
    case = Case(**TINY)
    results = list(measure(model, make_ids(5), case))
    assert [Result.from_json(r.to_json()) for r in results] == results
    quantities = ["rate", "first_token", "gap", "latency"]
    assert [(r.sparsity, r.quantity) for r in results] == [
        (sparsity, quantity) for sparsity in (0.0, 0.5) for quantity in quantities
    ]
    new = [arrival.new for arrival in arrivals(case)]
    for rate, first, gap, latency in (results[:4], results[4:]):
        assert rate.share == rate.value / rate.full_rate
        assert (first.samples, latency.samples) == (5, 5)
        assert gap.samples == sum(new) - 5
        for wait in (first, gap, latency):
            assert 0 < wait.low <= wait.value <= wait.p90 <= wait.p99 <= wait.longest
    (table,) = tables(results)
    assert [row[3] for row in table.rows] == 2 * ["first in ms", "gap in ms", "whole in s"]


def test_arrivals_are_those_of_their_seed_and_within_their_bounds():
    case = Case(**TINY | dict(sessions=200, seconds=7.0))
    drawn = arrivals(case)
    assert drawn == arrivals(case)
    assert drawn != arrivals(Case(**TINY | dict(sessions=200, seconds=7.0, seed=1)))
    times = [arrival.at for arrival in drawn]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= 7
    assert {arrival.prompt for arrival in drawn} == set(range(4, 21))
    assert {arrival.new for arrival in drawn} == set(range(3, 10))


class Past:
    def __init__(self, opened, *times):
        self.opened, self.token_times = opened, times


def test_the_rate_leaves_out_the_time_in_which_no_session_was_open():
    overlapping = [Past(0, 1, 2), Past(1, 3), Past(1.5, 2)]
    assert _rate(overlapping) == pytest.approx(4 / 3)
    assert _rate([*overlapping, Past(10, 11)]) == pytest.approx(5 / 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sessions=1), "at least 2 sessions"),
        (dict(shortest_prompt=30), "the shortest one first"),
        (dict(fewest_tokens=1), "2 new tokens"),
    ],
)
def test_a_case_that_cannot_be_timed_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Case(**TINY | changes)


def test_too_short_a_text_is_refused(model):
    with pytest.raises(ConfigError, match=r"\[4, 32\] tokens, too few for 5 prompts"):
        next(measure(model, make_ids(4), Case(**TINY)))


def test_rows_are_measured_together_beside_the_bytes_of_their_union(model):
    case = DecodeCase(
        model="tiny",
        sparsities=(0.0, 0.5),
        engines=("modules",),
        prompt_length=8,
        new_tokens=6,
        rounds=2,
        read_bytes=2**20,
    )
    results = list(measure_rows(model, make_ids(4), case, [1, 3]))
    assert [Result.from_json(r.to_json()) for r in results] == results
    times = {(r.batch, r.sparsity): r for r in results if r.quantity == "time"}
    assert list(times) == [(1, 0.0), (1, 0.5), (3, 0.0), (3, 0.5)]
    assert {r.variant for r in times.values()} == {"sessions, modules"}
    assert times[3, 0.5].dense_ms == times[3, 0.0].value
    assert times[1, 0.0].realized_sparsity == 0
    # what three rows drop together is less than what one drops
    assert 0.02 < times[3, 0.5].realized_sparsity < times[1, 0.5].realized_sparsity - 0.1
    assert times[3, 0.5].bytes > times[1, 0.5].bytes
    assert times[3, 0.0].tokens_per_second == pytest.approx(3e3 / times[3, 0.0].value)


def test_the_bytes_of_rows_count_what_any_of_them_keeps(model):
    texts = list(make_ids(3, 12))
    ((_, sparse),) = models_of(model, make_ids(8), [0.5], lambda text: None)
    one, dropped = bytes_of_rows(sparse, texts[:1], 12)
    shares = realized_sparsity(sparse, [texts[0][None]])
    assert dropped == pytest.approx(sum(shares.values()) / len(shares))
    read = read_shares(sparse, [texts[0][None]])
    expected = traffic.token_bytes(sparse, read) + 6.5 * slot_bytes(sparse)
    assert one == pytest.approx(expected)
    # the same text again drops the same
    assert bytes_of_rows(sparse, [texts[0]] * 3, 12)[1] == pytest.approx(dropped)
    assert bytes_of_rows(sparse, texts, 12)[1] < dropped - 0.1
