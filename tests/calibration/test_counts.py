import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cats.calibration.counts import BINS, bin_values, count, fraction_dropped, threshold_at
from cats.functional import ACTIVATIONS

TARGETS = [i / 100 for i in range(1, 100)]
N = 50_000


# each makes values of another distribution from normal ones
DISTRIBUTIONS = {
    "gaussian": lambda x: x,
    "small": lambda x: x * 1e-3,
    "large": lambda x: x * 1e3,
    "shifted up": lambda x: x + 3,
    "shifted down": lambda x: x - 3,
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    # silu has its minimum, -0.2785, at -1.2785: its magnitudes pile up there
    "pile-up": lambda x: -1.2785 + 0.1 * x,
    "constant": lambda x: torch.full((N,), 0.7),
    "two values": lambda x: torch.where(x > 0.3, 1.0, -0.5),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_realised_sparsity_is_within_a_tenth_of_a_point_and_the_tied_mass(activation, name):
    values = DISTRIBUTIONS[name](torch.randn(N, generator=torch.Generator().manual_seed(1)))

    def score(x):
        return ACTIVATIONS[activation](x.float()).abs()

    counts = count(values)
    exact, _ = score(values).sort()
    # one search takes milliseconds: all targets for the hardest activation, some for the others
    everywhere = activation == "silu"
    for target in TARGETS if everywhere else TARGETS[::14]:
        threshold, promised = threshold_at(counts, score, target)
        # what is dropped: the rule for positive scores; a score of 0 is skipped whatever happens
        below = int(torch.searchsorted(exact, threshold.clamp(min=1e-45)))
        realised = below / N
        # the mass that shares the score of the exact quantile cannot be split
        quantile = exact[min(N - 1, int(target * N))]
        first = int(torch.searchsorted(exact, quantile))
        last = int(torch.searchsorted(exact, quantile, right=True))
        tied = (last - first) / N
        tied = tied if last - first > 1 else 0.0
        assert abs(realised - target) <= 0.001 + tied, (target, float(threshold))
        assert abs(realised - promised) <= 0.001, (target, promised)


def test_threshold_lies_between_two_values_and_not_on_one():
    values = torch.tensor([0.25, 0.5, 1.0, 2.0])
    threshold, dropped = threshold_at(count(values), torch.abs, 0.5)
    assert 0.5 < threshold < 1.0
    assert dropped == 0.5


def test_relu_with_a_target_below_its_zeros_drops_the_zeros_only():
    values = torch.tensor([-1.0, -2.0, 3.0, 4.0])
    threshold, dropped = threshold_at(count(values), torch.relu, 0.1)
    assert threshold == 0
    assert dropped == fraction_dropped(count(values), torch.relu) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_counted_in_its_bin(dtype):
    values = torch.randn(999).to(dtype)
    counts = count(values)
    bins = counts.nonzero()[:, 0]
    assert counts.sum() == 999
    lower = bin_values(bins).repeat_interleave(counts[bins]).sort().values
    # a bin holds values up to 1/4096 larger than its smallest
    torch.testing.assert_close(lower, values.float().sort().values, rtol=1 / 4096, atol=0)


def test_special_values_have_bins_of_their_own():
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45])
    assert count(values).sum() == len(values)
    assert len(count(values[:4]).nonzero()) == 4


def test_counts_take_at_most_32_megabytes():
    assert count(torch.randn(10)).nbytes == count(torch.randn(100_000)).nbytes == BINS * 8
    assert BINS * 8 <= 32e6


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=4), order=st.randoms(use_true_random=False))
def test_counts_of_parts_add_up_in_any_split_and_order(cuts, order):
    values = torch.randn(500, generator=torch.Generator().manual_seed(2))
    parts = [*values.tensor_split(sorted(cuts))]
    order.shuffle(parts)
    assert torch.equal(sum(count(part) for part in parts), count(values))
