"""Rotary embeddings whose frequencies depend on the length of the text."""

import pytest
import torch
from transformers import LlamaConfig, Phi3Config

import cats
from cats.decode.rotary import LengthRule
from cats.errors import ConfigError
from tests.models import OLDER_TRANSFORMERS, assert_same_tokens, make_ids, make_model

ORIGINAL = 40
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    partial_rotary_factor=1.0,
    short_factor=[1.0] * 4,
    long_factor=[2.0 + i for i in range(4)],
    original_max_position_embeddings=ORIGINAL,
    factor=12.8,
)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)


def longrope(config=Phi3Config):
    extra = {} if config is LlamaConfig else {"original_max_position_embeddings": ORIGINAL}
    torch.manual_seed(0)
    return make_model(config, rope_parameters=dict(LONGROPE), **extra)


def dynamic():
    torch.manual_seed(0)
    return make_model(rope_parameters=dict(DYNAMIC), max_position_embeddings=ORIGINAL)


MODELS = {"phi3": longrope, "llama": lambda: longrope(LlamaConfig), "dynamic": dynamic}


def reference(make, ids, count):
    """What a model that has run nothing else generates."""
    model = make()
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, **GREEDY)


def test_rules_are_read_from_the_configuration():
    assert LengthRule.of(make_model().config) is None
    assert LengthRule.of(longrope().config) == LengthRule("longrope", ORIGINAL, 512)
    assert LengthRule.of(dynamic().config) == LengthRule("dynamic", ORIGINAL, 4 * ORIGINAL)


def test_keys_of_both_sides_have_other_frequencies():
    rule = LengthRule("longrope", 40, None)
    assert [rule.range_of(n) for n in (1, 40, 41, 900)] == [0, 0, 1, 1]
    rule = LengthRule("dynamic", 40, None)
    assert [rule.range_of(n) for n in (1, 39, 40, 41)] == [0, 0, None, None]


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
@pytest.mark.parametrize("prompt", [30, 39, 40, 41, 55])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_past_the_original_context_are_those_of_transformers(name, prompt):
    make, ids = MODELS[name], make_ids(1, prompt)
    expected = reference(make, ids, 25)
    model = make()
    assert_same_tokens(model, cats.generate(model, ids, max_new_tokens=25, **GREEDY), expected)


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_padded_rows_past_the_original_context_are_those_of_transformers():
    ids, mask = make_ids(2, 36), torch.ones(2, 36, dtype=torch.long)
    mask[1, :9] = 0
    model = longrope()
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
    actual = cats.generate(longrope(), ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
    assert_same_tokens(model, actual, expected, mask)


@pytest.mark.skipif(
    OLDER_TRANSFORMERS,
    reason="there, this model's forward pass branches on its length: it is refused",
)
def test_compiled_step_follows_the_lengths():
    ids = make_ids(1, 36)
    expected = reference(longrope, ids, 12)
    actual = cats.generate(longrope(), ids, engine="compiled", max_new_tokens=12, **GREEDY)
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
@pytest.mark.parametrize("name", MODELS)
def test_continued_conversation_gives_the_tokens_of_a_fresh_one(name):
    make = MODELS[name]
    model = make()
    decoder = cats.Decoder(model)
    text = make_ids(1, 20)
    for turn in range(3):  # the second one crosses the original context, the third begins beyond it
        expected = reference(make, text, 15)
        actual = decoder.generate(text, max_new_tokens=15, **GREEDY)
        assert_same_tokens(model, actual, expected)
        text = torch.cat([actual, make_ids(1, 3, seed=turn)], 1)
    # and back: keys with frequencies of a long text are of no use to a short one
    short = decoder.generate(text[:, :30], max_new_tokens=5, **GREEDY)
    assert_same_tokens(model, short, reference(make, text[:, :30], 5))


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_conversations_of_both_lengths_at_once_do_not_mix():
    model = longrope()
    prompts = make_ids(1, 12), make_ids(1, 60, seed=1)
    streams = [cats.Decoder(model).stream(ids, max_new_tokens=20, **GREEDY) for ids in prompts]
    answers = [torch.stack(row) for row in zip(*zip(*streams, strict=True), strict=True)]
    for ids, row in zip(prompts, answers, strict=True):
        assert torch.equal(row.T, reference(longrope, ids, 20)[:, ids.shape[1] :])


def test_text_past_the_scaled_context_is_an_error():
    with pytest.raises(ConfigError, match="context is 160"):
        cats.generate(dynamic(), make_ids(1, 150), max_new_tokens=20, **GREEDY)


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_dynamic_texts_that_run_by_turns_do_not_mix():
    model = dynamic()
    first, second = make_ids(1, 30), make_ids(1, 90, seed=5).clamp(min=1)
    stream = cats.Decoder(model).stream(first, max_new_tokens=30, **GREEDY)
    tokens = [int(next(stream)) for _ in range(15)]
    other = cats.generate(model, second, max_new_tokens=10, **GREEDY)
    tokens += [int(token) for token in stream]
    assert tokens == reference(dynamic, first, 30)[0, 30:].tolist()
    assert torch.equal(other, reference(dynamic, second, 10))
    # a text after a longer one, and the model itself afterwards
    assert torch.equal(
        cats.generate(model, first, max_new_tokens=30, **GREEDY), reference(dynamic, first, 30)
    )
    model.generation_config.eos_token_id = None
    plain = model.generate(
        first, attention_mask=torch.ones_like(first), max_new_tokens=30, **GREEDY
    )
    assert torch.equal(plain, reference(dynamic, first, 30))
