import pytest
import torch
from torch import nn
from transformers import Gemma3Config, MixtralConfig

import cats
from cats.errors import ConfigError, UnsupportedModelError
from cats.quantisation import check_bits, quantise_, select
from tests import models

SIZES = dict(hidden_size=64, intermediate_size=128, head_dim=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.make_model(**SIZES)


def test_all_linear_layers_of_the_decoder_are_quantised(model):
    selection = select(model, bits=4)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert selection.layers.keys() == linear - {"lm_head"}
    assert selection.head is None
    assert select(model, bits=4, head=True).head == "lm_head"


@pytest.mark.parametrize(
    ("bits", "asked", "expected"),
    [
        (4, None, 64),
        (4, 128, 64),
        (4, 64, 64),
        (4, 48, 32),
        (4, 16, 16),
        (8, None, None),
        (4, -1, None),
        (8, 32, 32),
    ],
)
def test_one_group_size_divides_every_width(model, bits, asked, expected):
    assert select(model, bits=bits, group_size=asked).group_size == expected


def test_defaults_are_groups_of_128_and_rows():
    assert (check_bits(4, None), check_bits(8, None)) == (128, None)


def test_width_without_whole_groups_is_refused_and_may_be_excluded():
    model = models.make_model(hidden_size=64, intermediate_size=100, head_dim=32)
    with pytest.raises(ConfigError, match=r"down_proj has 100 columns.*--exclude"):
        select(model, bits=4)
    selection = select(model, bits=4, exclude=["*.down_proj"])
    assert selection.group_size == 64
    assert not any("down_proj" in name for name in selection.layers)


BAD = {
    "bits": (dict(bits=3), "bits must be 4 or 8, got 3"),
    "group": (dict(bits=4, group_size=0), "at least one column, got 0"),
    "pattern of nothing": (dict(bits=4, exclude=["*vision*"]), "matches no layer"),
    "the head is no layer": (dict(bits=4, exclude=["lm_head"]), "matches no layer"),
    "all": (dict(bits=4, exclude=["*"]), "leaves no layer"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_cannot_be_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        select(model, **options)


def test_quantised_model_is_refused(model):
    with pytest.raises(UnsupportedModelError, match=r"expected an nn\.Linear with ordinary"):
        quantise_(quantise_(model, bits=8), bits=4)


def test_sparse_and_fused_models_are_refused(model):
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    cats.sparsify_(model, config)
    with pytest.raises(UnsupportedModelError, match="the model is sparse"):
        select(model, bits=4)
    cats.fuse_(model, backend="reference")
    with pytest.raises(UnsupportedModelError, match="the model is fused"):
        select(model, bits=4)


def test_stacked_experts_are_refused():
    config = MixtralConfig(**models.SIZES, num_local_experts=2)
    from transformers import AutoModelForCausalLM

    with pytest.raises(UnsupportedModelError, match="stacks several matrices"):
        select(AutoModelForCausalLM.from_config(config), bits=4)


def test_model_without_weights_is_refused():
    with torch.device("meta"):
        model = models.make_model()
    with pytest.raises(UnsupportedModelError, match="meta"):
        select(model, bits=4)


def test_other_modules_are_refused():
    with pytest.raises(UnsupportedModelError, match="no causal model"):
        select(models.Body(models.MLP()), bits=4)


def test_a_head_that_is_no_linear_layer_is_refused():
    model = models.make_model(**SIZES)
    model.set_output_embeddings(nn.Conv1d(64, 300, 1))
    with pytest.raises(UnsupportedModelError, match=r"is a Conv1d, expected an nn\.Linear"):
        select(model, bits=4, head=True)


def test_vision_tower_is_left_alone():
    from transformers import AutoModelForCausalLM

    config = Gemma3Config(
        text_config=models.SIZES | dict(vocab_size=300, pad_token_id=0),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        image_token_index=299,
        mm_tokens_per_image=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert any("vision" in n and isinstance(m, nn.Linear) for n, m in model.named_modules())
    names = select(model, bits=8).layers
    assert names
    assert not any("vision" in name for name in names)
