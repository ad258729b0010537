"""Pieces of prompts fit the time that others may wait."""

import pytest

from cats.decode.rows.pieces import LARGEST, PieceSizes


@pytest.mark.parametrize("per_token", [1e-5, 1e-4, 1e-3])
def test_pieces_settle_just_below_the_bound(per_token):
    sizes = PieceSizes(0.05)
    for _ in range(20):
        assert sizes.size * per_token <= 0.05 or sizes.size == 8
        sizes.took(sizes.size, sizes.size * per_token)
    assert sizes.size == LARGEST or 0.035 <= sizes.size * per_token <= 0.05


def test_a_piece_that_took_too_long_is_followed_by_a_smaller_one():
    sizes = PieceSizes(0.05)
    sizes.took(2048, 0.02)
    assert sizes.size == LARGEST
    sizes.took(LARGEST, 0.2)
    assert sizes.size == int(LARGEST * 0.8 / 4)


def test_a_short_prompt_does_not_change_the_size_of_long_pieces():
    sizes = PieceSizes(0.05)
    sizes.took(1000, 0.04)
    size = sizes.size
    sizes.took(3, 0.001)
    assert sizes.size == size


def test_a_piece_that_runs_alone_is_larger_and_one_with_less_time_smaller():
    sizes = PieceSizes(0.05)
    sizes.took(100, 0.04)
    assert (sizes.size, sizes.alone, sizes.within(0.5)) == (100, 2000, 50)
    assert sizes.within(-1) == 8


def test_pieces_are_never_empty():
    sizes = PieceSizes(0.05)
    sizes.took(8, 100.0)
    assert sizes.size == 8
