"""What the sanitizers of CUDA run; ``tests/ops/mlp/test_cuda.py`` runs it on a GPU."""

from pathlib import Path

import pytest

import cats.ops
from cats.decode.stream.packed import pack_
from cats.decode.stream.spec import read_spec
from tests.ops import sanitize_cuda


def test_every_kernel_is_among_those_that_are_checked():
    sources = Path(cats.ops.__file__).parent.rglob("*.cu")
    assert {path.stem for path in sources} == set(sanitize_cuda.KERNELS)


@pytest.mark.parametrize("case", sanitize_cuda.MODELS)
def test_kernels_can_run_every_model(case):
    pack_(read_spec(sanitize_cuda.make_case(*case)), [])
