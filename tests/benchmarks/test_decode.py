import pytest
import torch

from cats.benchmarks.decode import Case, measure, run_transformers
from cats.benchmarks.decode_report import table
from cats.benchmarks.shapes import random_model
from cats.errors import ConfigError
from cats.results import Result
from tests.models import make_ids, make_model

TINY = dict(
    model="tiny", sparsities=(0.5,), prompt_length=8, new_tokens=6, rounds=2, read_bytes=2**20
)


def test_every_variant_is_measured_with_its_limit():
    results = list(measure(make_model(), make_ids(8), Case(**TINY)))
    assert [Result.from_json(r.to_json()) for r in results] == results
    times = {(r.settings["variant"], r.settings["sparsity"]): r for r in results if r.unit == "ms"}
    assert times.keys() == {("eager", 0.0), ("generate", 0.0), ("eager", 0.5), ("generate", 0.5)}
    dense, sparse = times["eager", 0.0].settings, times["eager", 0.5].settings
    assert dense["realized_sparsity"] == 0
    assert 0.2 < sparse["realized_sparsity"] < 0.8
    # of each neuron that is dropped, a row of up and a column of down are not read
    dropped = sparse["realized_sparsity"] * 2 * (2 * 40 * 16) * 4
    assert dense["bytes"] - sparse["bytes"] == pytest.approx(dropped)
    assert table(results).row_count == 4


def test_a_head_that_is_no_embedding_counts_and_the_embedding_does_not():
    model = make_model()
    result = list(measure(model, make_ids(8), Case(**TINY | {"sparsities": ()})))[-1]
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    # keys and values: layers, heads, head size, slots on average
    cache = 2 * 2 * 1 * 8 * (8 + 3) * 4
    assert result.settings["bytes"] == weights + cache


def test_transformers_is_timed_once_a_token():
    run = run_transformers(make_model(), make_ids(1, 5), min_new_tokens=4, max_new_tokens=4)
    assert run.tokens.shape == (1, 9)
    assert run.times == sorted(run.times)
    assert len(run.times) == 4


@pytest.mark.parametrize("change", [{"rounds": 1}, {"sparsities": (1.0,)}, {"batch": 0}], ids=str)
def test_cases_that_cannot_be_right_are_errors(change):
    with pytest.raises(ConfigError):
        Case(**TINY | change)


def test_text_that_is_too_short_for_the_prompts_is_an_error():
    with pytest.raises(ConfigError, match="too few"):
        list(measure(make_model(), make_ids(1), Case(**TINY | {"batch": 2})))


def test_unknown_shape_is_an_error():
    with pytest.raises(ConfigError, match="one of"):
        random_model("llama-9", torch.float32, torch.device("cpu"))
