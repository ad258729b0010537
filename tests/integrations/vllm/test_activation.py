import pytest
import torch
from torch.nn import functional as F

from cats import ops
from cats.errors import ModelMismatchError
from cats.integrations.vllm.activation import SparseActAndMul
from cats.integrations.vllm.block import FORMS, Form

PRODUCTS = ("threshold", "product_threshold")


def make(form=FORMS["cats"], activation="silu", *, size=24, rank=0, ranks=1, **tensors):
    act = SparseActAndMul(form, activation, size=size, rank=rank, ranks=ranks)
    for name, tensor in tensors.items():
        parameter = getattr(act, name)
        parameter.weight_loader(parameter, tensor)
    return act


@pytest.mark.parametrize("form", [Form(), Form(router="up"), Form(router="up", tensors=PRODUCTS)])
def test_mlp_computes_what_the_operator_computes(form):
    thresholds = {name: torch.rand(24) for name in form.tensors}
    act = make(form, **thresholds)
    x, gate_up, down = torch.randn(5, 16), torch.randn(48, 16) / 4, torch.randn(16, 24) / 5
    gate, up = gate_up.chunk(2)
    expected = ops.gated_mlp(
        x,
        gate,
        up,
        down.t().contiguous().t(),
        thresholds["threshold"],
        "silu",
        form.router,
        product_thresholds=thresholds.get("product_threshold"),
        backend="reference",
    )
    product = act(F.linear(x, gate_up))
    assert 0.1 < (product == 0).float().mean() < 0.9
    assert torch.allclose(F.linear(product, down), expected, atol=1e-5)


def test_method_brings_its_activation():
    act = make(FORMS["relu"], threshold=torch.zeros(()))
    x = torch.randn(3, 48)
    assert torch.equal(act(x), F.relu(x[:, :24]) * x[:, 24:])


def test_each_process_loads_its_own_neurons():
    whole = torch.rand(24)
    parts = [make(size=8, rank=rank, ranks=3, threshold=whole).threshold for rank in range(3)]
    assert torch.equal(torch.cat([*parts]), whole)
    for stored in (torch.tensor(0.25), torch.tensor([0.25])):
        act = make(size=8, rank=2, ranks=3, threshold=stored)
        assert torch.equal(act.threshold, torch.full((8,), 0.25))


def test_thresholds_stay_in_float32_in_a_16_bit_model():
    stored = torch.full((24,), 0.1234567)
    torch.set_default_dtype(torch.bfloat16)
    try:
        act = make(threshold=stored)
    finally:
        torch.set_default_dtype(torch.float32)
    assert act.threshold.dtype == torch.float32
    assert torch.equal(act.threshold, stored)
    assert act(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_other_number_of_neurons_is_refused():
    with pytest.raises(ModelMismatchError, match=r"expected one number or 24, .* holds \[8\]"):
        make(size=8, ranks=3, threshold=torch.rand(8))
