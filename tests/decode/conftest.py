import pytest
import torch

from tests.models import make_model


@pytest.fixture(scope="package")
def llama():
    """A tiny dense model that no test changes."""
    torch.manual_seed(0)  # whatever ran before
    return make_model().to("cuda" if torch.cuda.is_available() else "cpu")
