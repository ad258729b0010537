"""Two masks on the neurons: one before the second matrix is read, a stricter one after it."""

from torch import Tensor

from cats.methods.staged import Sample, Stage, StagedMethod


class TwoStage(StagedMethod):
    """Drop rows of up by :class:`~cats.methods.neuron.Neuron`, and more columns of down.

    The row of a neuron in up is read where ``abs(a[i]) * rms(u[i])`` reaches one threshold, and its
    column of down where ``abs(a[i] * u[i]) * norm(down[:, i])`` reaches another. The second score
    is the size of what the neuron adds to the output (WINA, arXiv:2505.19427).
    """

    name = "two-stage"
    stages = ("rows", "columns")
    masked = ("down",)

    def factor(self, stage: Stage, sample: Sample) -> Tensor:
        return sample.up_rms if stage == "rows" else sample.down_norms
