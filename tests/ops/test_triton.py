"""What is particular to the Triton backend; its results are tested in test_gated_mlp.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cats import ops
from tests.ops.cases import make_inputs

triton = pytest.importorskip("triton")

from cats.ops import triton as backend  # noqa: E402
from cats.ops.triton import launch  # noqa: E402

GPUS = ["cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"]


def test_kernels_compile_without_a_gpu():
    script = Path(__file__).with_name("compile_triton.py")
    run = subprocess.run(
        [sys.executable, script, *GPUS],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    compiled = [line.split() for line in run.stdout.splitlines()]
    assert [target for target, *_ in compiled] == GPUS
    for target, *stages in compiled:
        assert ("cubin" if target.startswith("cuda") else "hsaco") in stages


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
    reason = backend.refuses(inputs.x, inputs.gate, inputs.up, inputs.down)
    assert reason == "the batch 9 is larger than 8"


def test_auto_leaves_batches_beyond_the_crossover_to_dense(monkeypatch, device):
    monkeypatch.setitem(ops._ORDER, device.type, ("triton", "dense"))
    for batch, expected in ((1, "triton"), (2, "dense")):
        inputs = make_inputs(8, 8, dtype=torch.float32, device=device, batch=batch)
        found = ops.backend_for(inputs.x, inputs.gate, inputs.up, inputs.down)
        assert found == expected


def test_refuses_empty_tensors(device):
    x, gate = torch.empty(0, 8, device=device), torch.empty(4, 8, device=device)
    assert backend.refuses(x, gate, gate, gate.t()) == "a tensor is empty"


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    x = torch.ones(1, 8)
    assert "needs tensors on a GPU" in backend.refuses(x, x, x, x.t())


def test_without_gpu_and_interpreter_it_says_why(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in backend.unavailable()


def test_each_call_has_its_own_workspace(device):
    inputs = make_inputs(16, 24, dtype=torch.float32, device=device)
    first = backend.gated_mlp(*inputs.args())
    kept = first.clone()
    other = make_inputs(16, 24, dtype=torch.float32, device=device)
    backend.gated_mlp(*other.args())
    assert torch.equal(first, kept)
