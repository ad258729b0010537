import pytest

from cats.errors import ConfigError
from cats.model import is_sparse
from cats.recipes import demonstrate

SMALL = {"tokens": 1024, "held_out_tokens": 512, "max_new_tokens": 3}


def test_demo_measures_both_and_leaves_the_model_dense(model, tokenizer, text, progress, device):
    names = {"prompt": "abc", "model_name": "tiny"}
    demonstration = demonstrate(
        model.to(device), tokenizer, text, **SMALL, **names, progress=progress
    )
    assert not is_sparse(model)
    assert demonstration.cats.mlp_share < demonstration.dense.mlp_share == 1
    assert demonstration.cats.token_bytes < demonstration.dense.token_bytes
    assert len(demonstration.cats.rounds) == len(demonstration.dense.transformers_rounds) == 3
    assert demonstration.to_dict()["dense"]["text"] == demonstration.dense.answer.text
    assert {r.settings["model"] for r in demonstration.results()} == {"tiny"}
    assert [r.quantity for r in demonstration.results()] == ["perplexity", "time", "time"] * 2
    assert progress.lines[0].startswith("about ")


def test_a_target_that_is_no_share_is_refused_first(model, tokenizer, text, progress):
    with pytest.raises(ConfigError, match="inside"):
        demonstrate(model, tokenizer, text, target_sparsity=50, progress=progress)
    assert not progress.lines
