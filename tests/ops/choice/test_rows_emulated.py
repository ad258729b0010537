"""The CUDA kernel that chooses the tokens of several rows on a CPU, by an emulator."""

import pytest
import torch

from tests.ops.emulator import emulated_kernels, needs_emulator

pytestmark = needs_emulator


@pytest.fixture
def choose(monkeypatch):
    """Chooses once; the state of the rows stays from call to call."""
    from cats.ops.choice import rows

    with emulated_kernels(monkeypatch):
        yield Choices(rows)


class Choices:
    def __init__(self, module):
        self._module = module
        self.lines, self.tokens = torch.tensor([2, 0, 3]), torch.full((5,), -5)
        self.positions = torch.tensor([7, 70, 700])
        self.active = torch.ones(3, dtype=torch.int32)
        self.step, self.chosen = torch.tensor([3]), torch.full((2, 4), -5)
        self.arrived = torch.zeros(4, dtype=torch.int32)

    def __call__(self, logits, softcap=0.0):
        best = torch.full((2, 3 * self._module.BLOCKS), torch.nan)
        launch = self._module.launch(
            logits=logits,
            best=best,
            arrived=self.arrived,
            lines=self.lines,
            active=self.active,
            positions=self.positions,
            tokens=self.tokens,
            step=self.step,
            chosen=self.chosen,
            softcap=softcap,
        )
        launch.function.launch(
            launch.arguments,
            blocks=launch.blocks,
            columns=launch.columns,
            stream=0,
            dependent=True,
        )
        assert not self.arrived.any()


@pytest.mark.parametrize("vocabulary", [1, 257, 20_001])
def test_each_row_takes_the_first_of_its_largest_logits(choose, vocabulary):
    logits = torch.randn(3, vocabulary)
    best = [vocabulary // 2, vocabulary - 1, 0]
    for row, token in enumerate(best):
        logits[row, token:] = 9
    choose(logits)
    assert choose.tokens.tolist() == [best[1], -5, best[0], best[2], -5]
    assert choose.chosen.tolist() == [[-5] * 4, [*best, -5]]
    assert choose.positions.tolist() == [8, 71, 701]
    assert choose.step.tolist() == [4]


def test_nan_counts_as_the_largest(choose):
    logits = torch.randn(3, 300)
    logits[1, 5] = torch.inf
    logits[1, 200] = torch.nan
    choose(logits)
    assert choose.chosen[1, 1] == 200
    assert choose.chosen[1, 0] == logits[0].argmax()


def test_choices_of_steps_are_kept_in_turn(choose):
    steps = [torch.randn(3, 40) for _ in range(3)]
    for logits in steps:
        choose(logits)
    assert choose.step.tolist() == [6]
    assert choose.chosen[0, :3].tolist() == steps[1].argmax(1).tolist()
    assert choose.chosen[1, :3].tolist() == steps[2].argmax(1).tolist()


def test_rows_that_are_not_active_choose_nothing(choose):
    choose.active[:] = torch.tensor([0, 1, 0])
    choose.lines[0], choose.lines[2] = 10**6, -3
    logits = torch.randn(3, 40)
    choose(logits)
    assert choose.tokens.tolist() == [int(logits[1].argmax()), -5, -5, -5, -5]
    assert choose.chosen[1].tolist() == [-5, int(logits[1].argmax()), -5, -5]
    assert choose.positions.tolist() == [7, 71, 700]
    assert choose.step.tolist() == [4]


def test_a_bound_makes_large_logits_equal(choose):
    logits = torch.zeros(3, 40)
    logits[:, 3], logits[:, 30] = 1e4, 2e4
    choose(logits, softcap=5.0)
    assert choose.chosen[1, :3].tolist() == [3, 3, 3]
