import pytest

from cats.errors import ConfigError
from cats.model import is_sparse
from cats.recipes import demonstrate

SMALL = {"tokens": 1024, "held_out_tokens": 512, "max_new_tokens": 3}


def test_demo_measures_all_and_leaves_the_model_dense(model, tokenizer, text, progress, device):
    names = {"prompt": "abc", "model_name": "tiny"}
    demonstration = demonstrate(
        model.to(device), tokenizer, text, **SMALL, **names, progress=progress
    )
    assert not is_sparse(model)
    dense, *sparse = demonstration.sides.values()
    assert [*demonstration.sides] == [
        "dense",
        "cats-50",
        "cats-70",
        "cascade-b66.7",
        "cascade-b53.3",
    ]
    assert dense.mlp_share == 1
    for half, more in (sparse[:2], sparse[2:]):
        assert more.mlp_share < half.mlp_share < 1
        assert more.token_bytes < half.token_bytes < dense.token_bytes
    for cats, cascade in zip(sparse[:2], sparse[2:], strict=True):
        assert cascade.mlp_share == pytest.approx(cats.mlp_share, abs=0.08)
    assert len(sparse[0].rounds) == len(dense.transformers_rounds) == 3
    assert demonstration.to_dict()["sides"]["dense"]["text"] == dense.answer.text
    results = demonstration.results()
    assert {r.settings["model"] for r in results} == {"tiny"}
    assert [r.quantity for r in results] == ["perplexity", "time", "time"] + [
        "perplexity",
        "time",
    ] * 4
    methods = [r.method for r in results if r.quantity == "perplexity"]
    assert methods == ["dense", "cats", "cats", "cascade", "cascade"]
    assert progress.lines[0].startswith("about ")


def test_a_target_that_is_no_share_is_refused_first(model, tokenizer, text, progress):
    with pytest.raises(ConfigError, match="inside"):
        demonstrate(model, tokenizer, text, sparsities=[50], progress=progress)
    assert not progress.lines
