"""The Triton backend: compilation, plans, refusals and loads. test_gated_mlp.py tests results."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cats import ops
from tests.ops.cases import make_inputs, product, router_output
from tests.thorough import usual

triton = pytest.importorskip("triton")

from cats.ops import GatedMLPArguments  # noqa: E402
from cats.ops.mlp import backends  # noqa: E402
from cats.ops.mlp import triton as backend  # noqa: E402
from cats.ops.mlp.triton import launch  # noqa: E402

GPUS = ["cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"]


@pytest.mark.parametrize("target", usual(GPUS, ["cuda:90", "hip:gfx942"]))
def test_kernels_compile_without_a_gpu(target):
    script = Path(__file__).with_name("compile_triton.py")
    run = subprocess.run(
        [sys.executable, script, target],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (compiled,) = (line.split() for line in run.stdout.splitlines())
    assert compiled[0] == target
    assert ("cubin" if target.startswith("cuda") else "hsaco") in compiled


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("size", [(1, 1), (576, 1536), (4096, 14336), (8192, 28672), (40000, 7)])
def test_plan_gives_every_program_work_and_powers_of_two(size, batch, itemsize):
    plan = launch.plan(batch, *size, itemsize, 132)
    assert 1 <= plan.programs <= max(1, size[1] // plan.rows)
    for number in (plan.rows, plan.warps):
        assert number & (number - 1) == 0
    assert plan.warps <= 16


def test_plan_keeps_the_partial_sums_small_beside_the_weights():
    for size in ((576, 1536), (896, 4864), (4096, 14336)):
        plan = launch.plan(1, *size, 2, 132)
        assert 4 * plan.programs * size[0] < 3 * 2 * size[0] * size[1] / 2


def test_refuses_a_batch_above_eight(device):
    inputs = make_inputs(8, 8, dtype=torch.float32, device=device, batch=9)
    reason = backend.refuses(GatedMLPArguments(*inputs.args()))
    assert reason == "the batch 9 is larger than 8"


def test_auto_leaves_batches_beyond_the_crossover_to_dense(monkeypatch, device):
    monkeypatch.setitem(backends.ORDER, device.type, ("triton", "dense"))
    for batch, expected in ((1, "triton"), (2, "dense")):
        inputs = make_inputs(8, 8, dtype=torch.float32, device=device, batch=batch)
        assert ops.backend_for(inputs.x, inputs.gate, inputs.up, inputs.down) == expected


def test_refuses_empty_tensors(device):
    x, gate = torch.empty(0, 8, device=device), torch.empty(4, 8, device=device)
    arguments = GatedMLPArguments(x, gate, gate, gate.t(), gate, "silu")
    assert backend.refuses(arguments) == "a tensor is empty"


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    x = torch.ones(1, 8)
    assert "needs tensors on a GPU" in backend.refuses(GatedMLPArguments(x, x, x, x.t(), x, "silu"))


def test_without_gpu_and_interpreter_it_says_why(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in backend.unavailable()


@pytest.fixture
def read_addresses(monkeypatch) -> list[np.ndarray]:
    """Addresses that the kernels read, as Triton's interpreter sees them."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("counts loads in Triton's interpreter, which runs on a CPU")
    from triton.runtime.interpreter import InterpreterBuilder

    addresses = []
    load = InterpreterBuilder.create_masked_load

    def recording_load(self, pointers, mask, *args):
        addresses.append(pointers.data[mask.data])
        return load(self, pointers, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recording_load)
    return addresses


@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("product_sparsity", [None, 0.5], ids=["", "product"])
def test_exactly_the_rows_of_kept_neurons_are_read(read_addresses, router, product_sparsity):
    options = dict(batch=2, router=router, sparsity=0.8, product_sparsity=product_sparsity)
    inputs = make_inputs(48, 90, dtype=torch.float32, device=torch.device("cpu"), **options)
    backend.gated_mlp(GatedMLPArguments(*inputs.args()))
    addresses = np.unique(np.concatenate([part.ravel() for part in read_addresses]))

    def rows_read(weight: torch.Tensor) -> torch.Tensor:
        offsets = addresses.astype(np.int64) - weight.data_ptr()
        inside = offsets[(offsets >= 0) & (offsets < weight.nbytes)]
        read = torch.zeros(len(weight), dtype=torch.bool)
        read[inside // weight[0].nbytes] = True
        return read

    other = inputs.up if router == "gate" else inputs.gate
    kept = (router_output(inputs).abs() >= inputs.thresholds).any(0)
    columns = kept
    if product_sparsity is not None:
        columns = (product(inputs).abs() >= inputs.product_thresholds).any(0)
        assert columns.sum() < kept.sum()
    assert rows_read(inputs.gate if router == "gate" else inputs.up).all()
    assert torch.equal(rows_read(other), kept)
    assert torch.equal(rows_read(inputs.down.t()), columns)


def test_each_call_has_its_own_workspace(device):
    inputs = make_inputs(16, 24, dtype=torch.float32, device=device)
    first = backend.gated_mlp(GatedMLPArguments(*inputs.args()))
    before = first.clone()
    other = make_inputs(16, 24, dtype=torch.float32, device=device)
    backend.gated_mlp(GatedMLPArguments(*other.args()))
    assert torch.equal(first, before)
