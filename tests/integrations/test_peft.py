"""Adapters of PEFT on sparse and fused models: what plain hooks on a dense model give, or an error.

Each case is compared with the dense model under the same adapter, whose small activations a hook
sets to zero.
"""

import copy

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

import cats
from cats.errors import CatsError, ModelMismatchError, UnsupportedModelError
from tests import models

# PEFT uses names that transformers has changed, and says what it does without position ids
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`is_gradient_checkpointing` is:FutureWarning",
        "`past_key_values` is:FutureWarning",
        "Position ids are not supported:UserWarning",
        "Already unmerged:UserWarning",
    )
]
CAUSAL = TaskType.CAUSAL_LM
MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(task_type=CAUSAL, r=2, target_modules=MLP, init_lora_weights=False),
    "dora": LoraConfig(
        task_type=CAUSAL, r=2, target_modules=MLP, init_lora_weights=False, use_dora=True
    ),
    "ia3": IA3Config(
        task_type=CAUSAL,
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "attention": LoraConfig(
        task_type=CAUSAL, r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False
    ),
    "prompt": PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
}
# These change no layer of an MLP, so that a fused one runs as before.
OUTSIDE = ("attention", "prompt", "prefix")


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return models.make_model()


@pytest.fixture(scope="module")
def config(dense):
    return cats.calibrate(dense, [models.make_ids()], target_sparsity=0.5)


def adapt(model, kind, name="default"):
    torch.manual_seed(7)
    return get_peft_model(model, copy.deepcopy(ADAPTERS[kind]), adapter_name=name).eval()


def plain(dense, config):
    model = copy.deepcopy(dense)
    for name, threshold in config.thresholds.items():
        model.get_submodule(name).act_fn.register_forward_hook(
            lambda m, args, out, t=threshold: torch.where(out.abs() >= t, out, 0.0)
        )
    return model


def logits(model):
    return models.logits(model, models.make_ids(2, 9, seed=3))


def assert_same(actual, expected):
    torch.testing.assert_close(logits(actual), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_on_a_sparse_model(dense, config, kind):
    expected = adapt(plain(dense, config), kind)
    model = adapt(cats.sparsify_(copy.deepcopy(dense), config), kind)
    assert_same(model, expected)
    if kind == "prefix":
        return  # PEFT's generate gives its prefix under a name that transformers now ignores
    ids = models.make_ids(1, 5)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    options["attention_mask"] = torch.ones_like(ids)
    answers = [m.generate(input_ids=ids, **options) for m in (model, expected)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_on_a_fused_model_is_right_or_refused(dense, config, kind):
    fused = cats.fuse_(cats.sparsify_(copy.deepcopy(dense), config))
    model = adapt(fused, kind)
    if kind in OUTSIDE:
        assert_same(model, adapt(plain(dense, config), kind))
    else:
        with pytest.raises(CatsError, match=r"cats\.unfuse_"):
            logits(model)
        cats.unfuse_(model)
        assert_same(model, adapt(plain(dense, config), kind))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_thresholds_after_the_adapter_are_right_or_refused(dense, config, kind):
    model = adapt(copy.deepcopy(dense), kind)
    with pytest.raises(ModelMismatchError, match="lacks 2 of the 2 MLPs"):
        cats.sparsify_(model, config)
    base = model.get_base_model()
    if kind in OUTSIDE:
        cats.sparsify_(base, config)
        expected = adapt(plain(dense, config), kind)
        assert_same(model, expected)
        cats.fuse_(base)
        assert_same(model, expected)
    else:
        before = logits(model)
        with pytest.raises(CatsError, match=r"adapters first|not a gated MLP|not the calibrated"):
            cats.fuse_(cats.sparsify_(base, config))
        cats.densify_(base)
        assert torch.equal(logits(model), before)


def test_fusing_a_sparse_model_with_adapters_is_refused(dense, config):
    model = adapt(cats.sparsify_(copy.deepcopy(dense), config), "lora")
    with pytest.raises(UnsupportedModelError):
        cats.fuse_(model)
    assert_same(model, adapt(plain(dense, config), "lora"))


def test_adapters_are_switched_per_call_merged_and_unmerged(dense, config):
    def two(model):
        model = adapt(model, "attention", "first")
        torch.manual_seed(11)
        model.add_adapter("second", copy.deepcopy(ADAPTERS["lora"]))
        return model.eval()

    expected = two(plain(dense, config))
    model = two(cats.sparsify_(copy.deepcopy(dense), config))
    seen = []
    for name in ("first", "second", "first"):
        for each in (model, expected):
            each.set_adapter(name)
        assert_same(model, expected)
        seen.append(logits(model))
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    for each in (model, expected):
        each.set_adapter("second")
        each.merge_adapter()
    assert_same(model, expected)
    for each in (model, expected):
        each.unmerge_adapter()
    assert_same(model, expected)
    with model.disable_adapter():
        assert_same(model, plain(dense, config))


def test_merged_adapter_can_be_fused(dense, config):
    expected = adapt(plain(dense, config), "lora")
    model = adapt(cats.sparsify_(copy.deepcopy(dense), config), "lora").merge_and_unload()
    cats.fuse_(model)
    assert_same(model, expected)


def test_adapter_of_the_attention_is_merged_while_the_model_is_fused(dense, config):
    expected = adapt(plain(dense, config), "attention")
    model = adapt(cats.fuse_(cats.sparsify_(copy.deepcopy(dense), config)), "attention")
    for change in ("merge_adapter", "unmerge_adapter"):
        for each in (model, expected):
            getattr(each, change)()
        assert_same(model, expected)
