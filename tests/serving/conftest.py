import httpx
import pytest

from tests.serving.live import make_chat_model, make_models, serving


@pytest.fixture(scope="package")
def address():
    """A live server of a tiny sparse model that no test stops: ``tiny`` and ``tiny:dense``."""
    with serving(make_models(make_chat_model(sparse=True))) as address:
        yield address


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client
