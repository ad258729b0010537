import os

# On a busy machine, each parallel region waits long for its last thread. The models are so small
# that one thread is enough. Processes that a test starts inherit the variable; tests of threads set
# their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first import of triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network

import pytest

torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_empty_memory():
    """``torch.empty`` gives NaN, so that a test fails if a kernel does not write an output."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
