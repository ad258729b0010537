"""Modules with the attributes of vLLM's layers, for tests without vLLM."""

import torch
from torch import nn
from torch.nn import functional as F


class MergedLinear(nn.Module):
    """``MergedColumnParallelLinear``: this process's part of gate, above that of up."""

    def __init__(self, hidden, size, *, rank=0, ranks=1, return_bias=True):
        super().__init__()
        self.input_size, self.output_sizes = hidden, [size, size]
        self.tp_rank, self.tp_size = rank, ranks
        self.return_bias = return_bias
        self.weight = nn.Parameter(torch.randn(2 * size // ranks, hidden))

    def forward(self, x):
        y = F.linear(x, self.weight)
        return (y, None) if self.return_bias else y


class RowLinear(nn.Module):
    """``RowParallelLinear``."""

    def __init__(self, size, hidden, *, ranks=1, return_bias=True):
        super().__init__()
        self.input_size, self.output_size, self.input_is_parallel = size, hidden, True
        self.return_bias = return_bias
        self.weight = nn.Parameter(torch.randn(hidden, size // ranks))

    def forward(self, x):
        y = F.linear(x, self.weight)
        return (y, None) if self.return_bias else y


class ActAndMul(nn.Module):
    """``SiluAndMul`` and the like, which run elsewhere unless they are called as native."""

    def __init__(self, act=F.silu):
        super().__init__()
        self.act = act

    def forward_native(self, x):
        gate, up = x.chunk(2, -1)
        return self.act(gate) * up

    def forward(self, x):
        raise NotImplementedError("a kernel of another device")


class MLP(nn.Module):
    """``LlamaMLP``."""

    def __init__(self, hidden=16, size=24, *, act=F.silu, rank=0, ranks=1):
        super().__init__()
        self.gate_up_proj = MergedLinear(hidden, size, rank=rank, ranks=ranks)
        self.down_proj = RowLinear(size, hidden, ranks=ranks)
        self.act_fn = ActAndMul(act)

    def forward(self, x):
        x, _ = self.gate_up_proj(x)
        x = self.act_fn(x)
        x, _ = self.down_proj(x)
        return x


class Model(nn.Module):
    """``model.layers.<i>.mlp``."""

    def __init__(self, *mlps):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for mlp in mlps:
            layer = nn.Module()
            layer.mlp = mlp
            self.model.layers.append(layer)
