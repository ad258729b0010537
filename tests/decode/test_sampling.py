import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cats.decode.sampling import Sampling, check_drawn, choose, process
from cats.errors import ConfigError, LogitsError

V = 50


@pytest.mark.parametrize(
    ("changes", "processor"),
    [
        ({"temperature": 0.6}, TemperatureLogitsWarper(0.6)),
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_k": V + 1}, TopKLogitsWarper(V + 1)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"top_p": 1e-6}, TopPLogitsWarper(1e-6)),
        ({"top_p": 0.0}, TopPLogitsWarper(0.0)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
    ids=lambda p: str(p) if isinstance(p, dict) else "",
)
def test_each_option_gives_the_scores_of_transformers(changes, processor):
    logits = 3 * torch.randn(4, V)
    actual = process(logits, None, Sampling(do_sample=True, **changes))
    torch.testing.assert_close(actual, processor(None, logits.clone()))


@pytest.mark.parametrize("do_sample", [False, True])
def test_repetition_penalty_gives_the_scores_of_transformers(do_sample):
    logits, ids = 3 * torch.randn(2, V), torch.tensor([[1, 2, 2], [0, 5, 49]])
    seen = torch.zeros(2, V, dtype=torch.bool).scatter_(1, ids, True)
    actual = process(logits, seen, Sampling(do_sample=do_sample, repetition_penalty=1.7))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    torch.testing.assert_close(actual, expected)


def test_all_options_together_give_the_scores_of_transformers():
    logits, ids = 3 * torch.randn(4, V), torch.randint(0, V, (4, 9))
    seen = torch.zeros(4, V, dtype=torch.bool).scatter_(1, ids, True)
    options = Sampling(
        do_sample=True, repetition_penalty=1.2, temperature=1.4, top_k=20, top_p=0.9, min_p=0.05
    )
    expected = logits.clone()
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(1.4),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.05),
    ):
        expected = processor(ids, expected)
    torch.testing.assert_close(process(logits, seen, options), expected)


def chi_squared(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_draws_follow_the_processed_distribution(wrong):
    draws = 40_000
    logits = torch.randn(1, 8)
    scores = process(logits, None, Sampling(do_sample=True, temperature=0.8, top_k=6))
    noise = torch.empty(draws, 8).exponential_()
    # the test itself can fail: a temperature that is off by a tenth is noticed
    tokens = choose((scores / 1.1 if wrong else scores).expand(draws, -1), noise)
    counts = torch.bincount(tokens, minlength=8).double()
    kept = scores[0].isfinite()
    assert counts[~kept].sum() == 0
    statistic = chi_squared(counts[kept], scores[0].double().softmax(-1)[kept])
    # 99.99 % of a chi-squared distribution with 5 degrees of freedom lie below 25.7
    assert (statistic > 25.7) == wrong


def test_without_noise_the_likeliest_is_chosen():
    scores = torch.randn(5, V)
    assert torch.equal(choose(scores, None), scores.argmax(-1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_options_out_of_range_are_errors(name, value):
    with pytest.raises(ConfigError):
        Sampling(do_sample=True, **{name: value})


def test_likeliest_token_in_two_steps_is_that_of_argmax(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    scores = torch.randint(40, (3, 128 * 130)).float()  # many equals
    scores[1, 77] = scores[1, 5000] = torch.nan
    scores[2] = -torch.inf
    assert choose(scores, None).tolist() == scores.argmax(-1).tolist()


@pytest.mark.parametrize("row", [[torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]])
def test_nothing_is_drawn_where_transformers_draws_nothing(row):
    scores = torch.tensor([[0.0, 1.0], row])
    with pytest.raises(RuntimeError):
        torch.multinomial(scores.softmax(-1), 1)
    tokens = choose(scores, torch.empty(2, 2).exponential_())
    assert tokens[0] >= 0 > tokens[1]
    check_drawn(tokens[:1])
    with pytest.raises(LogitsError, match="row 1"):
        check_drawn(tokens)
