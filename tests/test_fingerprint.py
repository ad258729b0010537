import pytest
import torch

import cats
from cats import checkpoint, fingerprint
from cats.errors import StorageError
from tests import models


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.make_model()


def test_one_changed_element_of_any_weight_changes_the_hash(model):
    before = fingerprint.of_model(model)
    for name, weight in model.named_parameters():
        original = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[weight.numel() // 3 + 1] += 0.5
        assert fingerprint.of_model(model) != before, name
        weight.data = original
    assert fingerprint.of_model(model) == before


def test_sparse_fused_and_dense_forms_of_a_model_have_one_hash(model):
    before = fingerprint.of_model(model)
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))
    assert fingerprint.of_model(model) == before
    # down_proj lies column by column now
    cats.fuse_(model)
    assert fingerprint.of_model(model) == before


def test_hash_is_that_of_the_saved_and_loaded_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = checkpoint.load_dense(tmp_path)
    assert fingerprint.of_model(loaded) == fingerprint.of_model(model)
    assert fingerprint.of_model(loaded.bfloat16()) != fingerprint.of_model(model)


def test_hash_is_the_same_on_every_device(model, device):
    before = fingerprint.of_model(model)
    assert fingerprint.of_model(model.to(device)) == before


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float16, torch.int8, torch.bool, torch.complex64]
)
def test_every_dtype_has_a_hash(dtype):
    module = torch.nn.Module()
    module.register_buffer("weight", torch.ones(3, 2).to(dtype))
    before = fingerprint.of_model(module)
    module.weight[1, 1] = 0
    assert fingerprint.of_model(module) != before


def test_each_threshold_counts(model):
    ids = [models.make_ids()]
    one = cats.calibrate(model, ids, target_sparsity=0.5)
    assert fingerprint.of_thresholds(one) == fingerprint.of_thresholds(
        cats.calibrate(model, ids, target_sparsity=0.5)
    )
    fewer = cats.calibrate(model, ids, target_sparsity=0.5, exclude=["model.layers.0.*"])
    assert fingerprint.of_thresholds(fewer) != fingerprint.of_thresholds(one)
    before = fingerprint.of_thresholds(one)
    one.thresholds["model.layers.1.mlp"].mul_(1.01)
    assert fingerprint.of_thresholds(one) != before


def test_tokenizer_counts_but_not_what_its_calls_leave_behind():
    tokenizer = models.make_tokenizer()
    before = fingerprint.of_tokenizer(tokenizer)
    tokenizer.pad_token = "<eos>"
    tokenizer(["a", "bbb"], padding=True, truncation=True, max_length=2)
    assert fingerprint.of_tokenizer(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    templated = fingerprint.of_tokenizer(tokenizer)
    assert templated != before
    tokenizer.add_tokens(["<word>"])
    assert fingerprint.of_tokenizer(tokenizer) != templated


def test_contents_and_names_of_files_count(tmp_path):
    path = tmp_path / "a"
    path.write_text("1")
    one = fingerprint.of_files({"test": path})
    assert fingerprint.of_files({"validation": path}) != one
    path.write_text("2")
    assert fingerprint.of_files({"test": path}) != one
    with pytest.raises(StorageError, match="absent"):
        fingerprint.of_files({"test": tmp_path / "absent"})


def test_order_and_shape_of_tokens_count():
    ids = torch.arange(6).view(2, 3)
    hashes = [fingerprint.of_tokens(t) for t in (ids, ids.flip(0), ids.view(3, 2), ids.int())]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]
