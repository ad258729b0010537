import os

# A machine that other programs use, or a second run of the tests, makes each parallel region wait
# for its last thread. The models are so small that one thread is enough; tests of threads set their
# own number. Processes that a test starts inherit it.
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
    """``torch.empty`` gives NaN, so an output that a kernel forgot to write fails the test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
