"""CATS with a factor for each neuron: what up gives on average counts as well."""

from torch import Tensor

from cats.methods.staged import Sample, Stage, StagedMethod


class Neuron(StagedMethod):
    """Drop a neuron where ``abs(a[i]) * rms(u[i])`` is below the layer's percentile.

    ``a = act(gate(x))``, ``u = up(x)``, and ``rms`` is over the calibration text. CATS compares
    ``abs(a[i])`` alone (arXiv:2404.08763). A threshold for each neuron that follows from
    the mean size of up is the channel-wise thresholding of CHESS (arXiv:2409.01366).
    """

    name = "neuron"
    stages = ("rows",)

    def factor(self, stage: Stage, sample: Sample) -> Tensor:
        return sample.up_rms
