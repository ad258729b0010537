import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from cats.weights import Dense, Foreign, nbytes, weight_of
from tests import models


def test_plain_linear_layer_is_dense_in_the_memory_of_its_parameter():
    layer = nn.Linear(6, 4).to(torch.bfloat16)
    weight = weight_of(layer)
    assert type(weight) is Dense
    assert weight.values is layer.weight
    assert (weight.shape, weight.dtype, weight.order) == ((4, 6), torch.bfloat16, "rows")
    assert (weight.bytes, weight.row_bytes, weight.column_bytes) == (48, 12, 8)
    assert weight.dequantised().data_ptr() == layer.weight.data_ptr()
    assert not weight.dequantised().requires_grad


def test_order_follows_the_memory():
    layer = nn.Linear(6, 4)
    layer.weight.data = layer.weight.data.t().contiguous().t()
    assert weight_of(layer).order == "columns"
    layer.weight.data = torch.zeros(8, 12)[::2, ::2]
    assert weight_of(layer).order is None


def test_part_is_some_rows_in_the_same_memory():
    layer = nn.Linear(6, 8)
    part = weight_of(layer).part(2, 5)
    assert torch.equal(part.dequantised(), layer.weight[2:5])
    assert part.values.data_ptr() == layer.weight[2:].data_ptr()
    assert (part.shape, part.bytes) == ((3, 6), 3 * 6 * 4)


def test_weight_on_meta_has_bytes_and_no_entries():
    weight = weight_of(nn.Linear(6, 8, device="meta"))
    assert (type(weight), weight.bytes, weight.device.type) == (Dense, 192, "meta")


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _with_buffer(layer):
    layer.register_buffer("scale", torch.ones(1))
    return layer


OTHERS = {
    "a subclass": lambda: Scaled(6, 8),
    "pruned": lambda: prune.random_unstructured(nn.Linear(6, 8), "weight", 0.5),
    "a weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
    "a buffer": lambda: _with_buffer(nn.Linear(6, 8)),
    "8 bits": lambda: nn.Linear(6, 8).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_layer_that_computes_or_stores_something_else_is_not_dense(make):
    assert type(weight_of(make())) is Foreign


def test_tensor_of_another_class_is_counted_by_what_it_holds():
    wrapped = models.Int8Tensor(torch.zeros(8, 6, dtype=torch.int8), torch.ones(8, 1))
    assert wrapped.element_size() == 4
    assert nbytes(wrapped) == 8 * 6 + 8 * 4
