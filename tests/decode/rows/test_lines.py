"""Who gets which line of the cache, and what lines hold."""

import numpy as np
import pytest

from cats.decode.rows.lines import Lines, common_length


def ids(*tokens):
    return np.array(tokens, dtype=np.int64)


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [((), (1,), 0), ((1, 2), (1, 2), 2), ((1, 2, 3), (1, 2), 2), ((1, 2, 3), (1, 5, 3), 1)],
)
def test_common_length(first, second, count):
    assert common_length(ids(*first), ids(*second)) == count


def test_a_prompt_gets_the_line_that_it_continues():
    lines = Lines(3, 8)
    taken = [lines.take(ids(1)) for _ in range(3)]
    for line, text in zip(taken, [(1, 2), (1, 2, 3), (4, 5)], strict=True):
        line.hold(0, ids(*text))
        lines.give_back(line)
    assert lines.take(ids(1, 2, 3, 4)) is taken[1]
    assert lines.take(ids(1, 2, 3, 4)) is taken[0]


def test_a_line_that_another_prompt_may_continue_is_kept_while_an_older_one_is_free():
    lines = Lines(2, 8)
    old, new = lines.take(ids(1)), lines.take(ids(1))
    for line, text in ((old, (7, 8)), (new, (1, 2, 3))):
        line.hold(0, ids(*text))
        lines.give_back(line)
    assert lines.take(ids(1, 2, 9)) is old
    assert lines.longest(ids(1, 2, 9)) == (new, 2)


def test_what_is_held_from_a_slot_on_replaces_all_later_slots():
    line = Lines(1, 8).take(ids(1))
    line.hold(0, ids(1, 2, 3, 4))
    line.hold(2, ids(9))
    assert line.tokens.tolist() == [1, 2, 9]


def test_after_a_change_of_the_model_a_running_session_leaves_nothing_to_others():
    lines = Lines(1, 8)
    line = lines.take(ids(1))
    line.hold(0, ids(1, 2))
    lines.forget()
    line.hold(2, ids(3))
    assert lines.longest(ids(1, 2, 3))[1] == 0
    lines.give_back(line)
    again = lines.take(ids(1))
    again.hold(0, ids(1, 2))
    assert lines.longest(ids(1, 2, 3))[1] == 2
