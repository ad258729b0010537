"""A server for clients: the one that ``CATS_TEST_SERVER`` names, else one in this process.

``make test-clients`` names one, since its environment has the clients and no torch.
"""

import json
import os
from urllib.request import Request, urlopen

import pytest


@pytest.fixture(scope="package")
def address():
    if named := os.environ.get("CATS_TEST_SERVER"):
        yield named
        return
    from tests.serving.live import make_chat_model, make_models, serving

    with serving(make_models(make_chat_model(sparse=True), context=512)) as own:
        yield own


@pytest.fixture(scope="package")
def no_spaces(address):
    """A bias against white space, of which a random model would write too much within JSON."""
    ids = set()
    for space in " \t\r\n":
        body = json.dumps({"model": "tiny", "prompt": space}).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{address}/tokenize", body, headers)) as answer:
            ids.update(json.load(answer)["tokens"])
    return {str(token): -100 for token in ids}
