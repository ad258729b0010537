"""The stream engine's launches over quantised weights, by an emulator of CUDA."""

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

import cats
from cats.decode.stream.spec import read_spec
from cats.errors import UnsupportedModelError
from tests.decode.test_stream_emulated import chain_module  # noqa: F401
from tests.models import make_ids, make_model
from tests.ops.emulator import needs_emulator
from tests.quantised import quantise_

pytestmark = needs_emulator
SIZES = dict(hidden_size=64, intermediate_size=160)
FAMILIES = [LlamaConfig, Qwen2Config, Qwen3Config, Gemma2Config, Phi3Config]


def quantised_model(config, kind, *, sparsity=0.5, group_size=32, **changes):
    model = make_model(config, **SIZES | changes)
    quantise_(model, kind, group_size=group_size)
    if sparsity:
        cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=sparsity))
    return model


def probe(model, spec=None):
    from cats.decode.stream.packed import packed
    from cats.decode.stream.probe import probe

    probe(model, spec or packed(read_spec(model)), lengths=(1, 37))


@pytest.mark.usefixtures("chain_module")
@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["int4", "int8 rows"])
def test_every_layer_and_a_token_are_those_of_the_model(config, kind):
    probe(quantised_model(config, kind))


@pytest.mark.usefixtures("chain_module")
@pytest.mark.parametrize("kind", ["int4 zeros", "int4 shifts"])
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("sparsity", [0, 0.9])
def test_zero_points_groups_and_sparsity(kind, group_size, sparsity):
    probe(quantised_model(LlamaConfig, kind, sparsity=sparsity, group_size=group_size))
