"""Which models are served, and what their ids mean."""

import httpx
import pytest
import torch
from torch import nn

import cats
from cats.errors import UnsupportedModelError
from cats.quantisation import quantise_
from cats.serving.models import dense_copy
from tests.models import logits, make_ids, make_model
from tests.serving.live import make_chat_model, make_models, serving


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "target", [{"target_sparsity": 0.6}, {"method": "cascade", "target_bytes": 0.5}]
)
def test_a_dense_copy_is_the_dense_model_and_shares_its_weights(fused, target):
    model = make_model()
    ids = make_ids(2, 9)
    dense = logits(model, ids)
    cats.sparsify_(model, cats.calibrate(model, [make_ids()], **target))
    if fused:
        cats.fuse_(model)
    sparse = logits(model, ids)
    copy = dense_copy(model)
    torch.testing.assert_close(logits(copy, ids), dense, atol=1e-5, rtol=1e-4)
    # the model itself has not changed
    assert torch.equal(logits(model, ids), sparse)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in copy.parameters()} == own


def test_a_dense_copy_of_packed_codes_shares_them():
    model = quantise_(make_model(hidden_size=32, head_dim=16, intermediate_size=64), bits=8)
    ids = make_ids(2, 9)
    dense = logits(model, ids)
    cats.sparsify_(model, cats.calibrate(model, [make_ids()], target_sparsity=0.6))
    cats.fuse_(model)
    copy = dense_copy(model)
    torch.testing.assert_close(logits(copy, ids), dense, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(logits(model, ids), dense, atol=1e-3)

    def storages(module):
        return {buffer.data_ptr() for buffer in module.buffers() if buffer.dtype == torch.uint8}

    assert storages(copy) == storages(model)


def test_a_method_that_replaces_the_activation_has_no_dense_copy():
    model = make_model()
    cats.sparsify_(model, cats.calibrate(model, [make_ids()], target_sparsity=0.5))
    for module in model.modules():
        if isinstance(module, cats.model.CatsActivation):
            module._replaced = nn.SiLU()
    with pytest.raises(UnsupportedModelError, match="use --dense-rows 0"):
        dense_copy(model)


@pytest.mark.parametrize(
    ("sparse", "dense_rows", "ids"),
    [
        (False, 2, ["tiny"]),
        (True, 2, ["tiny", "tiny:dense"]),
        (True, 0, ["tiny"]),
    ],
)
def test_a_sparse_model_has_a_dense_id(sparse, dense_rows, ids):
    models = make_models(make_chat_model(sparse=sparse), dense_rows=dense_rows)
    assert [model.id for model in models] == ids
    assert [model.is_sparse for model in models] == [sparse, False][: len(ids)]
    models.close()


def test_the_models_own_sampling_counts_where_it_draws():
    model = make_chat_model()
    models = make_models(model)
    assert models.get("tiny").defaults == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    models.close()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.6
    model.generation_config.top_k = 20
    models = make_models(model)
    assert models.get("tiny").defaults == {"temperature": 0.6, "top_p": 1.0, "top_k": 20}
    models.close()


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_a_model_whose_rows_cannot_run_together_answers_one_request_after_the_other():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = make_chat_model(rope_parameters=rope, max_position_embeddings=512)
    with pytest.warns(UserWarning, match="one after the other"):
        models = make_models(model)
    asked = dict(model="tiny", prompt="A cat is", max_tokens=5, ignore_eos=True, temperature=0)
    with serving(models) as address, httpx.Client(base_url=address, timeout=30) as client:
        whole = client.post("/v1/completions", json=asked).json()
        assert whole["usage"]["completion_tokens"] == 5
        meter = {"stream": True, "stream_options": {"include_meter": True}}
        assert client.post("/v1/completions", json=asked | meter).status_code == 200
        refused = client.post("/v1/completions", json=asked | {"logprobs": 1})
        assert refused.status_code == 400
        assert "run one after the other" in refused.json()["error"]["message"]
        assert client.get("/v1/models").json()["data"][0]["cats"]["rows"] == 1
