"""Input thresholding: small inputs of each matrix are dropped (TEAL, arXiv:2408.14690)."""

from cats.methods.staged import Sample, Stage, StagedMethod


class Teal(StagedMethod):
    """Drop the inputs of gate, up and down that are below a percentile of each.

    An input that is dropped is a column that need not be read. The inputs of down are the products
    of both branches. TEAL shares the bytes out among the matrices of a block by a greedy search,
    and here :mod:`cats.calibration.paths` does so for all methods.
    """

    name = "teal"
    stages = ("gate", "up", "columns")
    masked = ("gate", "up", "down")

    def factor(self, stage: Stage, sample: Sample) -> None:
        return None
