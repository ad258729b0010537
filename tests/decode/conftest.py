from types import SimpleNamespace

import pytest
import torch

from tests.models import make_model
from tests.ops.emulator import emulated_kernels, imagine_gpu


@pytest.fixture(scope="package")
def llama():
    """A tiny dense model that no test changes."""
    torch.manual_seed(0)  # whatever ran before
    return make_model().to("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def chain_module(monkeypatch):
    """The chain on an imaginary GPU of two multiprocessors."""
    from cats.decode.stream import chain

    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=100 * 1024)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    with emulated_kernels(monkeypatch):
        yield chain
