"""Options mean what they mean in transformers: the same scores, lengths and ends."""

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteria,
)

import cats
from cats.decode import state
from cats.decode.options import resolve
from cats.errors import ConfigError, DataError
from tests.models import OLDER_TRANSFORMERS, make_ids, make_model

IDS, MASK = make_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
MASK[1, :4] = 0
MODELS = [
    {},
    {"do_sample": True, "top_k": 7, "temperature": 0.7},
    {"repetition_penalty": 1.3, "top_p": 0.8, "min_p": 0.02, "max_new_tokens": 3},
    {"suppress_tokens": [3, 4], "max_length": 14},
]
CALLS = [
    {},
    {"do_sample": True},
    {"do_sample": True, "top_k": 5, "max_length": 12},
    {"do_sample": True, "top_k": None, "temperature": 1.7, "min_p": 0.05},
    {"do_sample": True, "top_k": 0, "top_p": 0.6, "repetition_penalty": 1.2, "max_new_tokens": 4},
    {"do_sample": True, "typical_p": 0.5, "epsilon_cutoff": 0.003, "renormalize_logits": True},
    {"do_sample": True, "eta_cutoff": 0.01, "top_h": 0.5, "temperature": 0.5},
    {"do_sample": False, "no_repeat_ngram_size": 1, "max_new_tokens": 6},
    {"do_sample": True, "bad_words_ids": [[7], [8, 9]], "sequence_bias": {(5,): 3.0}},
    {"begin_suppress_tokens": [1, 2], "forced_eos_token_id": 9, "eos_token_id": 9},
    {"min_new_tokens": 3, "eos_token_id": [4, 5], "pad_token_id": 6},
    {"min_length": 12, "exponential_decay_length_penalty": (2, 1.5), "do_sample": True},
    {"forced_bos_token_id": 5, "remove_invalid_values": True},
]
CONFIGS = [None, GenerationConfig(do_sample=True, top_p=0.5, eos_token_id=4, max_new_tokens=2)]


@pytest.fixture
def scores(monkeypatch):
    """The scores of each step that a token was chosen from."""
    found = []
    choose = state.choose
    monkeypatch.setattr(
        state, "choose", lambda s, noise: found.append(s.clone()) or choose(s, noise)
    )
    return found


@pytest.mark.filterwarnings("ignore")  # of transformers, about settings that it ignores
@pytest.mark.parametrize("of_model", MODELS, ids=str)
def test_scores_and_lengths_are_those_of_transformers(of_model, scores):
    if "repetition_penalty" in of_model and OLDER_TRANSFORMERS:
        pytest.skip("there, a penalty reaches the padding of a row")
    model = make_model()
    model.generation_config.update(**of_model)
    for call, config in itertools.product(CALLS, CONFIGS):
        options = {**call, "generation_config": config, "attention_mask": MASK}
        wanted = model.generate(IDS, return_dict_in_generate=True, output_scores=True, **options)
        scores.clear()
        ours = cats.generate(model, IDS, seed=0, **options)
        torch.testing.assert_close(scores[0].softmax(-1), wanted.scores[0].softmax(-1))
        sampled = {**of_model, **(config.to_diff_dict() if config else {}), **call}
        if not sampled.get("do_sample"):
            assert torch.equal(ours, wanted.sequences), call
        elif "exponential_decay_length_penalty" not in call:  # which needs an end
            options["eos_token_id"] = None
            wanted = model.generate(IDS, **options)
            assert cats.generate(model, IDS, **options).shape == wanted.shape


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_processed_steps_give_the_tokens_of_transformers(engine):
    model = make_model()
    options = dict(
        do_sample=False,
        no_repeat_ngram_size=2,
        bad_words_ids=[[5, 6], [9]],
        min_new_tokens=10,
        max_new_tokens=40,
        repetition_penalty=1.1,
        attention_mask=MASK,
    )
    ours = cats.generate(model, IDS, engine=engine, **options)
    assert torch.equal(ours, model.generate(IDS, **options))


class Only(LogitsProcessor):
    """One token is possible, another one for each length."""

    def __call__(self, ids, scores):
        scores[:] = -torch.inf
        scores[:, ids.shape[1]] = 0
        return scores


class Until(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        return (ids == self.token).any(1)


@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_and_criteria_given_as_objects_run(llama, do_sample):
    until = Until()
    until.token = 15
    ids = make_ids(1, 9).clamp(min=100)
    found = cats.generate(
        llama,
        ids,
        logits_processor=[Only()],
        stopping_criteria=[until],
        max_new_tokens=30,
        do_sample=do_sample,
        eos_token_id=None,
    )
    assert found[0, 9:].tolist() == list(range(9, 16))


def test_allowed_tokens_are_those_of_the_function(llama):
    def allowed(row, ids):
        return [row + 1, len(ids)]

    options = dict(prefix_allowed_tokens_fn=allowed, max_new_tokens=8, do_sample=False)
    ids = make_ids(2, 5).to(llama.device)
    assert torch.equal(cats.generate(llama, ids, **options), llama.generate(ids, **options))


def test_processor_of_the_user_replaces_that_of_the_option(llama):
    own = MinNewTokensLengthLogitsProcessor(5, 9, torch.tensor([7], device=llama.device))
    free = cats.generate(llama, make_ids(1, 5), max_new_tokens=20, do_sample=False)
    options = dict(
        min_new_tokens=1,
        logits_processor=[own],
        eos_token_id=int(free[0, 6]),
        max_new_tokens=20,
        do_sample=False,
    )
    ids = make_ids(1, 5).to(llama.device)
    assert torch.equal(cats.generate(llama, ids, **options), llama.generate(ids, **options))


def test_time_ends_all_rows(llama, monkeypatch):
    ids = make_ids(2, 5)
    assert cats.generate(llama, ids, max_time=0.0, max_new_tokens=50).shape == (2, 6)
    assert cats.generate(llama, ids, max_time=600, max_new_tokens=50).shape == (2, 55)


def test_several_sequences_a_prompt_lie_together(llama):
    options = dict(num_return_sequences=3, do_sample=True, seed=0, max_new_tokens=4)
    found = cats.generate(llama, [[1, 2], [3]], eos_token_id=None, **options)
    assert found[:, :2].tolist() == [[1, 2]] * 3 + [[256, 3]] * 3
    assert len(set(map(tuple, found[:3].tolist()))) > 1


def test_streamer_gets_what_transformers_gives_it(llama):
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, tokens):
            self.got.append(tokens.tolist())

        def end(self):
            self.got.append("end")

    ours, theirs = Streamer(), Streamer()
    ids = make_ids(1, 5).to(llama.device)
    cats.generate(llama, ids, max_new_tokens=6, do_sample=False, streamer=ours)
    llama.generate(ids, max_new_tokens=6, do_sample=False, streamer=theirs)
    assert ours.got == theirs.got


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": np.int64(3)},
        {"max_new_tokens": torch.tensor(3)},
        {"max_length": np.array(8)},
        {"eos_token_id": torch.tensor([7, 8])},
        {"eos_token_id": [torch.tensor(7), np.int32(8)]},
        {"eos_token_id": np.array([7, 8])},
        {"eos_token_id": (7, 8), "pad_token_id": torch.tensor(9)},
        {"temperature": np.float32(0.5), "do_sample": np.bool_(True)},
        {"top_k": torch.tensor(4), "top_p": torch.tensor(0.25), "do_sample": True},
        {"seed": np.int64(1), "max_time": np.float64(0.5)},
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch_count_as_those_of_python(llama, changes):
    def python(value):
        if isinstance(value, list | tuple):
            return [int(one) for one in value]
        return value.tolist() if hasattr(value, "tolist") else value

    plain = {name: python(value) for name, value in changes.items()}
    assert resolve(llama, 5, changes) == resolve(llama, 5, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": True},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": "3"},
        {"temperature": "hot"},
        {"do_sample": "no"},
        {"eos_token_id": [True]},
        {"eos_token_id": 1.0},
        {"seed": 0.5},
        {"pad_token_id": -1},
        {"pad_token_id": 257},
        {"num_return_sequences": 2},
        {"num_return_sequences": 0},
        {"stop_strings": [1]},
        {"stop_strings": ""},
        {"logits_processor": Only()},
        {"stopping_criteria": [MaxLengthCriteria(5)]},
        {"suppress_tokens": 5},
        {"no_repeat_ngram_size": 1.5},
        {"bad_words_ids": [7]},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": None},
        {"guidance_scale": 1.5},
        {"num_beams": np.int64(2)},
        {"assistant_model": object()},
        {"prompt_lookup_num_tokens": 2},
        {"encoder_repetition_penalty": 1.2},
        {"return_dict_in_generate": True},
        {"output_scores": True},
        {"synced_gpus": True},
        {"pixel_values": torch.zeros(1)},
        {"generation_config": GenerationConfig(num_beams=2)},
    ],
    ids="-".join,
)
def test_what_cannot_run_is_refused(llama, options):
    with pytest.raises(ConfigError):
        cats.generate(llama, make_ids(1, 5), **options)


def test_settings_that_ask_for_the_usual_are_taken(llama):
    usual = dict(
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        return_dict_in_generate=False,
        guidance_scale=None,
        bos_token_id=1,
        length_penalty=1.0,
        penalty_alpha=0.0,
        suppress_tokens=None,
        synced_gpus=False,
    )
    options = resolve(llama, 5, usual)
    assert options == resolve(llama, 5, {})
    assert options.processors is None


def test_default_length_ends_with_the_context(llama):
    ids = make_ids(1, 500)
    assert cats.generate(llama, ids, do_sample=False).shape == (1, 512)


def test_negative_padding_of_an_old_checkpoint_is_none_at_all():
    model = make_model()
    model.generation_config.pad_token_id = -1
    assert resolve(model, 5, {}).pad_token_id == 256
    assert cats.generate(model, [[1, 2], [3]], max_new_tokens=4).shape == (2, 6)


def test_padding_in_ids_without_a_mask_is_found_as_by_transformers(llama):
    ids = make_ids(2, 6).clamp(min=1).to(llama.device)
    ids[0, :3] = 0
    options = dict(max_new_tokens=10, pad_token_id=0, do_sample=False)
    expected = llama.generate(ids, **options)
    assert torch.equal(cats.generate(llama, ids, **options), expected)
    assert not torch.equal(cats.generate(llama, ids, max_new_tokens=10), expected)
    ids[0, 4] = ids[1, 2] = 0
    options["repetition_penalty"] = 1.5
    expected = llama.generate(ids, **options)
    assert torch.equal(cats.generate(llama, ids, **options), expected)
    ids[0, 5] = 0
    with pytest.raises(DataError, match="attention_mask"):
        cats.generate(llama, ids, **options)
