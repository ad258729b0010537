import pytest
import torch

import cats
from cats.checkpoint import load_dense
from cats.errors import ConfigError, UnsupportedModelError
from cats.metrics import perplexity
from cats.recipes import quantise
from cats.weights import QuantisedLinear
from tests import models

SIZES = dict(hidden_size=64, intermediate_size=128, head_dim=32)
BLOCKS, HELD_OUT = models.make_ids(rows=8), models.make_ids(rows=4, seed=1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.make_model(**SIZES)


def test_gptq_is_taken_where_there_are_blocks_and_its_cost_is_measured(model, progress, tmp_path):
    before = perplexity(model, [HELD_OUT])
    result = quantise(model, BLOCKS, HELD_OUT, head=True, progress=progress)
    assert (result.method, result.bits, result.group_size) == ("gptq", 4, 64)
    assert (result.calibration_tokens, result.held_out_tokens) == (256, 128)
    assert result.ignored == ()
    assert [step.name for step in result.steps] == ["before", "layers", "head"]
    assert [step.kind for step in result.steps] == [
        "float32",
        "int4, groups of 64",
        "int8, a scale per row",
    ]
    assert [step.layers for step in result.steps] == [0, 14, 1]
    assert result.steps[0].perplexity == pytest.approx(before)
    assert result.steps[2].perplexity == pytest.approx(perplexity(model, [HELD_OUT]))
    sizes = [step.bytes for step in result.steps]
    assert sizes == sorted(sizes, reverse=True)
    assert progress.lines == ["groups of 64 columns, because a width is no multiple of 128"]
    assert [text for text, _ in progress.tracked] == [
        "perplexity before",
        "perplexity after",
        "head",
    ]
    model.save_pretrained(tmp_path)
    assert torch.equal(models.logits(load_dense(tmp_path), BLOCKS), models.logits(model, BLOCKS))


def test_without_text_numbers_are_rounded_and_nothing_is_measured(model):
    result = quantise(model, bits=8, exclude=["*.down_proj"])
    assert result.method == "rtn"
    assert result.steps[1].perplexity is None
    assert result.ignored == (
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    )


def test_tied_head_costs_memory_and_spares_bytes_of_a_token(progress):
    model = models.make_model(**SIZES, tie_word_embeddings=True)
    result = quantise(model, None, HELD_OUT, bits=8, head=True, progress=progress)
    (line,) = progress.lines
    assert line.startswith("the output head is the embedding: it becomes a matrix in 8 bits")
    _, layers, head = result.steps
    rows, columns = model.lm_head.matrix.shape
    assert head.bytes - layers.bytes == rows * (columns + 4)
    assert layers.token_bytes - head.token_bytes == rows * (4 * columns - columns - 4)
    assert head.perplexity != layers.perplexity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "4 or 8"),
        ({"group_size": 0}, "at least one"),
        ({"method": "magic"}, "rtn, gptq"),
        ({"method": "gptq", "blocks": None}, "needs text"),
        ({"exclude": ["foo"]}, "matches no layer"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_runs(model, options, message):
    blocks = options.pop("blocks", BLOCKS)
    with pytest.raises(ConfigError, match=message):
        quantise(model, blocks, HELD_OUT, **options)
    assert not any(isinstance(m, QuantisedLinear) for m in model.modules())


def test_quantised_model_is_not_quantised_again(model):
    quantise(model, bits=8)
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        quantise(model, BLOCKS, HELD_OUT)


def test_failure_on_the_way_leaves_the_model_as_it_was(model, monkeypatch):
    def fail(_):
        raise UnsupportedModelError("no")

    before = models.logits(model, BLOCKS)
    monkeypatch.setattr(cats.recipes.quantisation, "store_packed_", fail)
    with pytest.raises(UnsupportedModelError, match="no"):
        quantise(model, BLOCKS, HELD_OUT)
    assert torch.equal(models.logits(model, BLOCKS), before)
