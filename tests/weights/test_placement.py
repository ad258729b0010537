import accelerate
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cats.errors import UnsupportedModelError
from cats.weights.placement import (
    check_has_weights,
    has_weights,
    input_device,
    is_offloaded,
    materialized,
)


def test_weights_on_meta_are_missing_and_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert not has_weights(model)
    assert not is_offloaded(model)
    with pytest.raises(UnsupportedModelError, match=r"1\.weight is on the meta device"):
        check_has_weights(model)


def test_offloaded_weights_are_there_and_in_memory_within_the_block():
    model = nn.Sequential(nn.Linear(2, 2))
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert is_offloaded(model)
    assert has_weights(model)
    assert model[0].weight.is_meta
    with materialized(model):
        assert not model[0].weight.is_meta
    assert model[0].weight.is_meta
    assert input_device(model).type == "cpu"


def test_module_that_holds_only_buffers_runs_where_they_are():
    module = nn.Module()
    module.register_buffer("missing", torch.zeros(2, device="meta"))
    with FakeTensorMode():
        module.register_buffer("codes", torch.zeros(2, device="cuda:1"))
    assert input_device(module) == torch.device("cuda:1")
    assert input_device(nn.Identity()).type == "cpu"
