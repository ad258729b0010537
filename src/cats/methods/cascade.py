"""Three masks, each after the one before: inputs of gate, rows of up, columns of down."""

from torch import Tensor

from cats.methods.staged import Sample, Stage, StagedMethod


class Cascade(StagedMethod):
    """Drop inputs of gate by ``abs(x[d]) * norm(gate[:, d])``, then as ``two-stage``.

    The router itself, which CATS reads whole, skips the columns of small inputs: the mask of
    :class:`~cats.methods.teal.Teal` with norms of columns (WINA, arXiv:2505.19427). Rows of up and
    columns of down are those of :class:`~cats.methods.two_stage.TwoStage`.
    """

    name = "cascade"
    stages = ("gate", "rows", "columns")
    masked = ("gate", "down")

    def factor(self, stage: Stage, sample: Sample) -> Tensor:
        if stage == "gate":
            return sample.gate_norms
        return sample.up_rms if stage == "rows" else sample.down_norms
