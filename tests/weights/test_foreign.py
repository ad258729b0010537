import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cats.errors import UnsupportedModelError
from cats.weights import Foreign, weight_of
from tests import models


def quantised():
    layer = nn.Linear(6, 8)
    scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    values = (layer.weight.detach() / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(models.Int8Tensor(values, scale), requires_grad=False)
    return layer


def test_quantised_tensor_counts_what_is_stored_and_reads_by_its_own_code():
    layer = quantised()
    weight = weight_of(layer)
    assert type(weight) is Foreign
    assert (weight.shape, weight.dtype) == ((8, 6), torch.float32)
    assert weight.bytes == 8 * 6 + 8 * 4  # codes and scales, without the bias
    assert torch.equal(weight.dequantised(), layer.weight.dequantize())
    half = weight.part(4, 8)
    assert (half.shape, half.bytes) == ((4, 6), weight.bytes // 2)
    assert torch.equal(half.dequantised(), weight.dequantised()[4:])
    assert torch.equal(half.part(1, 2).dequantised(), weight.dequantised()[5:6])


def test_layer_of_gpt2_is_turned():
    layer = Conv1D(8, 6)
    weight = weight_of(layer)
    assert weight.shape == (8, 6)
    assert torch.equal(weight.dequantised(), layer.weight.t())


def test_numbers_that_an_adapter_changes_are_not_read():
    model = nn.Sequential(nn.Linear(6, 8))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    weight = weight_of(adapted.base_model.model[0])
    assert weight.shape == (8, 6)
    assert weight.bytes == 4 * (8 * 6 + 2 * 6 + 8 * 2)
    with pytest.raises(UnsupportedModelError, match="merge adapters"):
        weight.dequantised()


def test_codes_without_a_way_to_read_them_are_an_error():
    layer = nn.Linear(6, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="Linear cannot be read"):
        weight_of(layer).dequantised()


@pytest.mark.parametrize("module", [nn.Identity(), nn.LayerNorm(4), nn.Embedding(3, 4), nn.SiLU()])
def test_other_modules_are_no_linear_layers(module):
    assert weight_of(module) is None


def test_message_names_what_is_stored():
    assert repr(weight_of(quantised())) == (
        "<Linear [8, 6] that holds Int8Tensor of torch.float32>"
    )
