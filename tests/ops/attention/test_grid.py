"""How launches of attention are cut into blocks."""

from itertools import pairwise

import pytest

from tests.ops.cases import needs_nvrtc

pytestmark = needs_nvrtc  # it comes with the bindings that the module imports
SHAPES = [(32, 8), (32, 32), (28, 4), (9, 3), (8, 1), (71, 1), (1, 1)]


def grid(slots, heads, key_heads, multiprocessors=132):
    from cats.ops.attention.cuda import grid_of

    return grid_of(slots, heads, key_heads, multiprocessors)


@pytest.mark.parametrize("multiprocessors", [2, 20, 132])
@pytest.mark.parametrize(("heads", "key_heads"), SHAPES)
def test_buffers_of_the_longest_context_are_enough_for_all_others(
    heads, key_heads, multiprocessors
):
    grids = [
        grid(slots, heads, key_heads, multiprocessors) for slots in [*range(1, 2000, 37), 10**5]
    ]
    assert all(a.splits <= b.splits for a, b in pairwise(grids))
    assert all(g.columns <= heads for g in grids)
    assert all(g.splits == 1 or g.splits * g.columns <= 2 * multiprocessors for g in grids)


@pytest.mark.parametrize(("heads", "key_heads"), SHAPES)
def test_blocks_take_all_heads(heads, key_heads):
    for slots in (1, 256, 600, 5000):
        g = grid(slots, heads, key_heads)
        parts = g.columns // key_heads
        assert g.heads <= 4
        assert g.heads * parts >= heads // key_heads > g.heads * (parts - 1)


def test_blocks_of_short_contexts_have_one_head_and_those_of_long_ones_two():
    assert grid(256, 32, 8) == (1, 32, 1)
    assert grid(512, 32, 8) == (8, 32, 1)
    assert grid(1024, 32, 8) == (8, 32, 1)
    assert grid(4096, 32, 8) == (16, 16, 2)


def test_blocks_have_four_heads_where_those_of_two_would_not_run_at_once():
    assert grid(4096, 1024, 256) == (1, 256, 4)
