import pytest
from accelerate import dispatch_model

import cats
from cats.errors import BackendError
from tests.models import make_ids, make_model


def test_stream_refuses_a_model_that_accelerate_places_and_says_so(monkeypatch):
    monkeypatch.setattr("cats.decode.engines.stream_refusal", lambda device: None)
    model = dispatch_model(make_model(), {"": "cpu"}, force_hooks=True)
    with pytest.raises(BackendError, match="device_map"):
        cats.generate(model, make_ids(1, 5), engine="stream", max_new_tokens=1)
    ids = make_ids(1, 5)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **options)
    assert cats.generate(model, ids, engine="eager", **options).equal(expected)
