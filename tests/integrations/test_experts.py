import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig

import cats
from cats.errors import UnsupportedModelError
from cats.ops.experts import BACKENDS
from tests import models


@pytest.fixture(autouse=True)
def registered():
    cats.register()
    yield
    cats.unregister()


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    model = models.make_model(MixtralConfig, num_local_experts=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.25)
    return model


@pytest.mark.parametrize("per_expert", [None, False, True], ids=["dense", "layer", "expert"])
def test_implementation_computes_what_the_others_do(mixture, per_expert):
    model = copy.deepcopy(mixture)
    if per_expert is not None:
        batches = [models.make_ids(8, 64)]
        config = cats.calibrate(model, batches, target_sparsity=0.5, per_expert=per_expert)
        cats.sparsify_(model, config)
    prompt, token = models.make_ids(2, 9), models.make_ids(1, 3)
    expected = [models.logits(model, ids) for ids in (prompt, token)]
    model.set_experts_implementation("cats")
    for ids, logits in zip((prompt, token), expected, strict=True):
        torch.testing.assert_close(models.logits(model, ids), logits, rtol=1e-4, atol=1e-4)
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = model.generate(token, attention_mask=torch.ones_like(token), **options)
    assert torch.equal(cats.generate(model, token, **options), tokens)


def test_a_token_takes_the_kernel_and_a_prompt_dense_products(mixture, monkeypatch):
    chosen = []
    choose = type(BACKENDS).backend_for
    monkeypatch.setattr(
        type(BACKENDS), "backend_for", lambda s, a: chosen.append(choose(s, a)) or chosen[-1]
    )
    model = copy.deepcopy(mixture)
    model.set_experts_implementation("cats")
    models.logits(model, models.make_ids(1, 1))
    models.logits(model, models.make_ids(2, 9))
    assert chosen == [*["cpu"] * 2, *["dense"] * 2]


def test_it_is_calibrated_measured_and_loaded_as_others_are(mixture, tmp_path):
    ids = models.make_ids(4, 16)
    expected = cats.calibrate(mixture, [ids], target_sparsity=0.5)
    model = copy.deepcopy(mixture)
    model.set_experts_implementation("cats")
    config = cats.calibrate(model, [ids], target_sparsity=0.5)
    assert config == expected
    cats.sparsify_(model, config)
    shares = cats.metrics.realized_sparsity(model, [ids])
    assert all(0.4 < share < 0.6 for share in shares.values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="cats")
    torch.testing.assert_close(models.logits(loaded, ids), models.logits(model, ids))


def test_other_formulas_and_training_are_refused(mixture):
    sizes = models.SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes))
    model.set_experts_implementation("cats")
    with pytest.raises(UnsupportedModelError, match="GptOssExperts: they compute another formula"):
        models.logits(model.eval(), models.make_ids())
    model = copy.deepcopy(mixture).train()
    model.set_experts_implementation("cats")
    with pytest.raises(UnsupportedModelError, match=r"no gradient.*grouped_mm"):
        model(models.make_ids())


def test_without_register_transformers_does_not_know_it(mixture):
    cats.unregister()
    with pytest.raises(ValueError, match="not supported"):
        copy.deepcopy(mixture).set_experts_implementation("cats")
