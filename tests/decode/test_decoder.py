import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import cats
from cats.errors import (
    BackendError,
    ConfigError,
    DataError,
    LogitsError,
    UnsupportedModelError,
)
from tests import models
from tests.models import FAMILIES, OLDER_TRANSFORMERS, assert_same_tokens, logits, make_tokenizer

# The same tests on a GPU, where `auto` is another engine.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENGINES = ["eager", "compiled", *(["stream"] if DEVICE == "cuda" else [])]
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def make_model(*args, **changes):
    return models.make_model(*args, **changes).to(DEVICE)


def make_ids(*args, **kwargs):
    return models.make_ids(*args, **kwargs).to(DEVICE)


def fused(config=LlamaConfig, **changes):
    model = make_model(config, **changes)
    cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=0.5))
    return cats.fuse_(model)


def reference(model, ids, **options):
    """What transformers generates; without an end, whatever the model's own configuration says."""
    mask = options.pop("attention_mask", torch.ones_like(ids))
    eos = options.pop("eos_token_id", None)
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, eos
    try:
        return model.generate(ids, attention_mask=mask, eos_token_id=eos, **options)
    finally:
        model.generation_config.eos_token_id = before


def padded(rows=3, length=9):
    ids, mask = make_ids(rows, length), torch.ones(rows, length, dtype=torch.long, device=DEVICE)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return ids, mask


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
def test_tokens_are_those_of_transformers_for_every_family(config):
    model, ids = fused(config), make_ids(1, 7)
    actual = cats.generate(model, ids, max_new_tokens=200, **GREEDY)
    assert_same_tokens(model, actual, reference(model, ids, max_new_tokens=200, **GREEDY))


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
def test_padded_batch_gives_the_tokens_of_transformers(config):
    model, (ids, mask) = fused(config), padded()
    options = dict(attention_mask=mask, max_new_tokens=60, **GREEDY)
    actual = cats.generate(model, ids, **options)
    assert_same_tokens(model, actual, reference(model, ids, **options), mask)


@pytest.mark.parametrize("config", [MistralConfig, Gemma2Config, Gemma3TextConfig])
@pytest.mark.parametrize("window", [16, 80])
def test_tokens_past_the_sliding_window_are_those_of_transformers(config, window):
    model, ids = make_model(config, sliding_window=window), make_ids(1, 12)
    actual = cats.generate(model, ids, max_new_tokens=150, **GREEDY)
    assert_same_tokens(model, actual, reference(model, ids, max_new_tokens=150, **GREEDY))


@pytest.mark.parametrize("padding", [False, True])
def test_tokens_past_the_first_window_of_slots_are_those_of_transformers(llama, padding):
    ids, mask = padded(2, 200)
    if not padding:
        mask = torch.ones_like(mask)
    options = dict(attention_mask=mask, max_new_tokens=120, **GREEDY)
    actual = cats.generate(llama, ids, **options)
    assert_same_tokens(llama, actual, reference(llama, ids, **options), mask)


@pytest.mark.parametrize("padding", [False, True])
def test_compiled_engine_gives_the_tokens_of_transformers(padding):
    model = fused(num_hidden_layers=4)
    ids, mask = padded(2) if padding else padded(1)
    options = dict(attention_mask=mask, max_new_tokens=40, **GREEDY)
    actual = cats.generate(model, ids, engine="compiled", **options)
    assert_same_tokens(model, actual, reference(model, ids, **options), mask)


def test_rows_end_at_eos_and_are_filled_up_as_by_transformers(llama):
    ids = make_ids(3, 5)
    free = cats.generate(llama, ids, max_new_tokens=40, **GREEDY)
    eos = [int(free[0, 12]), int(free[1, 25])]
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=eos, pad_token_id=3)
    expected = reference(llama, ids, **options)
    assert torch.equal(cats.generate(llama, ids, **options), expected)


def test_repetition_penalty_gives_the_tokens_of_transformers(llama):
    options = dict(max_new_tokens=40, repetition_penalty=1.5, **GREEDY)
    ids = make_ids(2, 6)
    assert torch.equal(cats.generate(llama, ids, **options), reference(llama, ids, **options))


def test_seed_decides_about_sampled_tokens(llama):
    def sample(seed):
        options = dict(do_sample=True, temperature=1.5, top_k=40, max_new_tokens=30)
        return cats.generate(llama, make_ids(2, 4), seed=seed, eos_token_id=None, **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_sampled_tokens_follow_the_model(llama):
    ids, rows = make_ids(1, 6), 2000
    with torch.no_grad():
        p = (llama(ids).logits[0, -1].double() / 0.5).softmax(-1)
    options = dict(do_sample=True, temperature=0.5, top_k=0, seed=0, eos_token_id=None)
    tokens = cats.generate(llama, ids.expand(rows, -1), max_new_tokens=1, **options)[:, -1]
    likely = p.topk(10).indices
    counts = torch.stack([(tokens == t).sum() for t in likely]).double()
    counts, p = (
        torch.cat([counts, rows - counts.sum()[None]]),
        torch.cat([p[likely], 1 - p[likely].sum()[None]]),
    )
    # 99.99 % of a chi-squared distribution with 10 degrees of freedom lie below 35.6
    assert ((counts - rows * p) ** 2 / (rows * p)).sum() < 35.6


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_sampled_step_by_step_follow_the_model(engine):
    model = make_model()
    with torch.no_grad():
        # every step then has the same logits
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].clone())
        p = (model(make_ids(1, 1)).logits[0, -1].double() / 0.5).softmax(-1)
    options = dict(do_sample=True, temperature=0.5, top_k=0, max_new_tokens=500, eos_token_id=None)
    rows = [
        cats.generate(model, make_ids(1, 1), engine=engine, seed=seed, **options)[0, 1:]
        for seed in range(4)
    ]
    tokens = torch.cat(rows)
    likely = p.topk(10).indices
    counts = torch.stack([(tokens == t).sum() for t in likely]).double()
    counts = torch.cat([counts, len(tokens) - counts.sum()[None]])
    p = torch.cat([p[likely], 1 - p[likely].sum()[None]])
    # 99.99 % of a chi-squared distribution with 10 degrees of freedom lie below 35.6
    assert ((counts - len(tokens) * p) ** 2 / (len(tokens) * p)).sum() < 35.6


def test_generation_config_of_the_model_is_read():
    model, ids = make_model(), make_ids(1, 5)
    model.generation_config.max_new_tokens = 7
    model.generation_config.eos_token_id = None
    assert cats.generate(model, ids).shape == (1, 12)
    model.generation_config.num_beams = 4
    with pytest.raises(ConfigError, match="num_beams"):
        cats.generate(model, ids)


def test_stop_string_ends_a_row_with_the_token_that_completes_it(llama):
    tokenizer, ids = make_tokenizer(), make_ids(2, 5)
    free = cats.generate(llama, ids, max_new_tokens=40, **GREEDY)[:, 5:]
    stop = tokenizer.decode(free[0, 10:13])
    actual = cats.generate(
        llama, ids, max_new_tokens=40, stop_strings=stop, tokenizer=tokenizer, **GREEDY
    )[:, 5:]
    ends = [
        next((i for i in range(1, 41) if stop in tokenizer.decode(row[:i])), 40) for row in free
    ]
    assert ends[0] <= 13
    for row, expected, end in zip(actual, free, ends, strict=True):
        assert torch.equal(row[:end], expected[:end])
        assert not row[end:].any()


def test_callback_and_stream_give_the_tokens_of_each_step(llama):
    ids, called = make_ids(2, 5), []
    whole = cats.generate(llama, ids, max_new_tokens=9, callback=called.append, **GREEDY)
    streamed = list(cats.Decoder(llama).stream(ids, max_new_tokens=9, **GREEDY))
    assert torch.equal(torch.stack(called, 1), whole[:, 5:].cpu())
    assert torch.equal(torch.stack(streamed, 1), whole[:, 5:].cpu())


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_logits_of_nan_are_an_error_where_a_token_is_drawn(penalty):
    model = make_model()
    prompt = model.generate(make_ids(1, 5).to(DEVICE), max_new_tokens=3, do_sample=False)
    options = dict(max_new_tokens=5, repetition_penalty=penalty, eos_token_id=None)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    decoder = cats.Decoder(model)
    with pytest.raises(LogitsError, match="NaN"):
        decoder.generate(prompt, do_sample=True, **options)
    # what is likeliest is taken as by transformers
    ours = decoder.generate(prompt, do_sample=False, **options)
    assert torch.equal(ours, model.generate(prompt, do_sample=False, **options))


def test_logits_that_become_nan_end_a_stream_behind_its_good_tokens():
    model, ids = make_model(), make_ids(1, 5)
    stream = cats.Decoder(model).stream(ids, max_new_tokens=9, do_sample=True, eos_token_id=None)
    next(stream)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(LogitsError):
        list(stream)


def test_padding_is_not_penalised(llama):
    rows = [make_ids(1, 5)[0].tolist(), make_ids(1, 12, seed=1)[0].tolist()]
    options = dict(max_new_tokens=20, repetition_penalty=1.5, **GREEDY)
    # the token that a penalty would keep away from the start of the answer
    pad = options["pad_token_id"] = int(cats.generate(llama, rows[:1], **options)[0, 5])
    together = cats.generate(llama, rows, **options)[0, 12:]
    assert torch.equal(together, cats.generate(llama, rows[:1], **options)[0, 5:])
    if OLDER_TRANSFORMERS:
        return
    # with the padding of the user it is the same, in transformers too
    ids = torch.tensor([[pad] * 7 + rows[0], rows[1]], device=DEVICE)
    mask = torch.tensor([[0] * 7 + [1] * 5, [1] * 12], device=DEVICE)
    expected = reference(llama, ids, attention_mask=mask, **options)
    assert torch.equal(cats.generate(llama, ids, attention_mask=mask, **options), expected)
    assert torch.equal(expected[0, 12:].cpu(), together.cpu())


@pytest.mark.parametrize("skip", [False, True])
def test_streamed_text_joins_to_the_text_of_the_tokens(llama, skip):
    tokenizer, ids = make_tokenizer(), make_ids(1, 5)
    options = dict(max_new_tokens=60, do_sample=True, temperature=3.0, seed=1)
    new = cats.generate(llama, ids, **options)[0, 5:]
    pieces = list(
        cats.Decoder(llama).stream_text(
            ids, tokenizer=tokenizer, skip_special_tokens=skip, **options
        )
    )
    assert "".join(pieces) == tokenizer.decode(new, skip_special_tokens=skip)
    assert len(pieces) > 10


def test_streamed_text_ends_with_its_stop_string(llama):
    tokenizer, options = make_tokenizer(), dict(max_new_tokens=40, **GREEDY)
    prompt = "A cat"
    whole = "".join(cats.Decoder(llama).stream_text(prompt, tokenizer=tokenizer, **options))
    stop = next(letter for letter in whole[5:] if letter.isascii())
    stream = cats.Decoder(llama).stream_text(
        prompt, tokenizer=tokenizer, stop_strings=[stop], **options
    )
    assert "".join(stream) == whole[: whole.index(stop) + 1]


def test_streamed_text_of_several_prompts_is_an_error(llama):
    stream = cats.Decoder(llama).stream_text([[1], [2]], tokenizer=make_tokenizer())
    with pytest.raises(DataError, match="one prompt"):
        next(stream)


def test_lists_of_ids_of_different_lengths_are_padded(llama):
    rows = [[5, 6, 7, 8], [9, 10]]
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]], device=DEVICE)
    mask = torch.tensor([[1] * 4, [0, 0, 1, 1]], device=DEVICE)
    actual = cats.generate(llama, rows, max_new_tokens=20, **GREEDY).to(DEVICE)
    expected = reference(llama, ids, attention_mask=mask, max_new_tokens=20, **GREEDY)
    assert torch.equal(actual, expected)


class Passes:
    """The number of tokens of each forward pass of models that have a counting embedding.

    Decoding sees lists that change as changes of the model, but not an object such as this one.
    """

    def __init__(self):
        self.lengths = []


PASSES = Passes()


class CountingEmbedding(nn.Embedding):
    def forward(self, ids):
        PASSES.lengths.append(ids.shape[1])
        return super().forward(ids)


def count_passes(model):
    """The list to which each pass adds its number of tokens; a hook would end the reuse."""
    model.model.embed_tokens.__class__ = CountingEmbedding
    return PASSES.lengths


@pytest.mark.parametrize("engine", ENGINES)
def test_next_turn_runs_only_new_tokens_and_gives_the_same(engine):
    model = make_model()
    decoder = cats.Decoder(model, engine=engine)
    first = decoder.generate(make_ids(1, 20), max_new_tokens=10, **GREEDY)
    prompt = torch.cat([first, make_ids(1, 6, seed=1)], 1)
    second = decoder.generate(prompt, max_new_tokens=10, **GREEDY)
    assert torch.equal(second, reference(model, prompt, max_new_tokens=10, **GREEDY))
    # an earlier turn is edited: only what lies before it is used again
    edited = prompt.clone()
    edited[0, 15] = (edited[0, 15] + 1) % 256
    third = decoder.generate(edited, max_new_tokens=10, **GREEDY)
    assert torch.equal(third, reference(model, edited, max_new_tokens=10, **GREEDY))


def test_rows_that_share_different_prefixes_give_the_same_tokens(llama):
    decoder, ids = cats.Decoder(llama), make_ids(2, 20)
    decoder.generate(ids, max_new_tokens=10, **GREEDY)
    ids[1, 5] = (ids[1, 5] + 1) % 256
    actual = decoder.generate(ids, max_new_tokens=10, **GREEDY)
    assert torch.equal(actual, reference(llama, ids, max_new_tokens=10, **GREEDY))


@pytest.mark.parametrize("new_tokens", [1, 10])
def test_shared_prefix_is_not_run_again(new_tokens):
    model = make_model()
    lengths = count_passes(model)
    decoder = cats.Decoder(model)
    first = decoder.generate(make_ids(1, 20), max_new_tokens=new_tokens, **GREEDY)
    lengths.clear()
    # the newest token of an answer is not in the cache yet
    decoder.generate(torch.cat([first, make_ids(1, 5)], 1), max_new_tokens=1, **GREEDY)
    assert lengths == [6]


def test_growing_conversation_gives_the_same_tokens(llama):
    decoder, ids = cats.Decoder(llama), make_ids(1, 100)
    for _ in range(3):
        expected = reference(llama, ids, max_new_tokens=100, **GREEDY)
        ids = decoder.generate(ids, max_new_tokens=100, **GREEDY)
        assert torch.equal(ids, expected)


def test_conversations_on_one_model_do_not_mix(llama):
    a, b = cats.Decoder(llama), cats.Decoder(llama)
    ids = make_ids(2, 8)
    streams = [
        decoder.stream(row[None], max_new_tokens=20, **GREEDY)
        for decoder, row in zip((a, b), ids, strict=True)
    ]
    steps = [torch.cat(pair) for pair in zip(*streams, strict=True)]
    expected = [reference(llama, row[None], max_new_tokens=20, **GREEDY)[0, 8:] for row in ids]
    assert torch.equal(torch.stack(steps, 1), torch.stack(expected).cpu())


@pytest.mark.parametrize(
    "change", ["sparsify", "weights", "loaded", "replaced", "dtype", "hook", "setting"]
)
def test_model_changed_between_calls_gives_its_new_tokens(change):
    model, ids = make_model(), make_ids(1, 8)
    if change == "setting":
        model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp)
    decoder = cats.Decoder(model)
    before = decoder.generate(ids, max_new_tokens=60, **GREEDY)
    mlp = model.model.layers[0].mlp  # its output is in the keys and values of the next layer
    if change == "sparsify":
        cats.fuse_(cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=0.9)))
    elif change == "weights":
        with torch.no_grad():
            mlp.up_proj.weight.mul_(-1)
    elif change == "loaded":
        negated = {k: -v for k, v in model.state_dict().items() if "up_proj" in k}
        model.load_state_dict(negated, strict=False)
    elif change == "setting":
        mlp.scale = -1.0
    elif change == "replaced":
        mlp.up_proj = nn.Linear(16, 40, bias=False, device=DEVICE)
    elif change == "dtype":
        model.to(torch.float64)
        mlp.up_proj.weight.data.mul_(-1)
    else:
        mlp.register_forward_hook(lambda m, args, out: -out)
    after = decoder.generate(ids, max_new_tokens=60, **GREEDY)
    assert not torch.equal(after, before)
    assert torch.equal(after, reference(model, ids, max_new_tokens=60, **GREEDY))


class Scaled(nn.Module):
    """Decides by a number that is no tensor, as adapters decide whether they are merged."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, 1.0

    def forward(self, x):
        return self.inner(x) * self.scale


@pytest.mark.parametrize("engine", ENGINES)
def test_reset_makes_up_for_writes_that_torch_does_not_count(engine):
    model, ids = make_model(), make_ids(1, 8)
    decoder = cats.Decoder(model, engine=engine)
    before = decoder.generate(ids, max_new_tokens=30, **GREEDY)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)
    decoder.reset()
    after = decoder.generate(ids, max_new_tokens=30, **GREEDY)
    assert not torch.equal(after, before)
    assert torch.equal(after, reference(model, ids, max_new_tokens=30, **GREEDY))


def test_texts_are_taken_with_a_tokenizer(llama):
    tokenizer = make_tokenizer()
    texts = ["one text", "a longer text"]
    expected = cats.generate(llama, tokenizer(texts)["input_ids"], max_new_tokens=5, **GREEDY)
    actual = cats.generate(llama, texts, tokenizer=tokenizer, max_new_tokens=5, **GREEDY)
    assert torch.equal(actual, expected)
    assert torch.equal(
        cats.generate(llama, texts[0], tokenizer=tokenizer, max_new_tokens=5, **GREEDY)[0],
        expected[0, 5:],
    )


def test_weights_written_in_place_during_a_stream_are_seen(llama):
    model, ids = make_model(), make_ids(1, 8)
    stream = cats.Decoder(model).stream(ids, max_new_tokens=30, **GREEDY)
    begun = [int(next(stream)) for _ in range(3)]
    unchanged = reference(model, ids, max_new_tokens=30, **GREEDY)[0, 8:].tolist()
    with torch.no_grad():
        model.lm_head.weight.neg_()
    rest = [int(t) for t in stream]
    assert begun == unchanged[:3]
    assert rest != unchanged[3:]


def test_dropped_or_interrupted_stream_leaves_a_decoder_that_is_right(llama):
    decoder, ids = cats.Decoder(llama), make_ids(1, 8)
    expected = reference(llama, ids, max_new_tokens=20, **GREEDY)
    stream = decoder.stream(ids, max_new_tokens=20, **GREEDY)
    next(stream)
    del stream

    def interrupt(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.generate(ids, max_new_tokens=20, callback=interrupt, **GREEDY)
    assert torch.equal(decoder.generate(ids, max_new_tokens=20, **GREEDY), expected)


_HALF_READ = """
import sys
# as if it were not installed: importing torchao prints lines of its own
sys.modules["torchao"] = None
import cats
from tests.models import make_ids, make_model
decoder = cats.Decoder(make_model())
for stream in (decoder.stream(make_ids(1, 5), max_new_tokens=9), decoder.stream(make_ids(1, 5))):
    next(stream)
"""


def test_stream_that_is_half_read_at_exit_is_closed():
    run = subprocess.run([sys.executable, "-c", _HALF_READ], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


def test_closed_stream_gives_no_more(llama):
    stream = cats.Decoder(llama).stream(make_ids(1, 5), max_new_tokens=9, **GREEDY)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_second_call_of_a_thread_ends_its_first_stream(llama):
    decoder, ids = cats.Decoder(llama), make_ids(1, 8)
    stream = decoder.stream(ids, max_new_tokens=20, **GREEDY)
    next(stream)
    whole = decoder.generate(ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(whole, reference(llama, ids, max_new_tokens=20, **GREEDY))
    with pytest.raises(ConfigError, match="later call"):
        next(stream)


def test_threads_on_one_decoder_wait_for_each_other(llama):
    decoder, rows = cats.Decoder(llama), make_ids(3, 8)
    results = {}

    def work(i):
        results[i] = decoder.generate(rows[i : i + 1], max_new_tokens=25, **GREEDY)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        expected = reference(llama, rows[i : i + 1], max_new_tokens=25, **GREEDY)
        assert torch.equal(results[i], expected)


class Branching(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > -1e9 else x


def test_model_that_branches_on_values_runs_untraced_and_says_so():
    model, ids = make_model(Qwen2Config), make_ids(1, 8)
    expected = reference(model, ids, max_new_tokens=20, **GREEDY)
    model.model.norm = Branching(model.model.norm)
    with pytest.warns(UserWarning, match="cannot be traced"):
        actual = cats.generate(model, ids, engine="eager", max_new_tokens=20, **GREEDY)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("inputs", "options", "error"),
    [
        (make_ids(1, 500), {"max_new_tokens": 20}, ConfigError),
        (make_ids(1, 5), {"max_new_tokens": 0}, ConfigError),
        (make_ids(1, 5), {"max_length": 5}, ConfigError),
        (make_ids(1, 5), {"num_beams": 2}, ConfigError),
        (make_ids(1, 5), {"temperature": 0.0, "do_sample": True}, ConfigError),
        (make_ids(1, 5), {"top_p": 2.0, "do_sample": False}, ConfigError),
        (make_ids(1, 5), {"stop_strings": "a"}, ConfigError),
        (make_ids(1, 5), {"engine": "fast"}, ConfigError),
        (make_ids(1, 5).float(), {}, DataError),
        (make_ids(1, 0), {}, DataError),
        (make_ids(1, 5) + 250, {}, DataError),
        ([[1], []], {}, DataError),
        ("a text", {}, DataError),
        (["a text", "another"], {}, DataError),
        (["a text", [1, 2]], {"tokenizer": make_tokenizer()}, DataError),
        (7, {}, DataError),
        ([0.5], {}, DataError),
        ({"ids": [1]}, {}, DataError),
        (make_ids(1, 3), {"attention_mask": torch.tensor([[1, 1, 0]], device=DEVICE)}, DataError),
        (make_ids(1, 3), {"attention_mask": torch.tensor([[1, 1]], device=DEVICE)}, DataError),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_an_error(llama, inputs, options, error):
    with pytest.raises(error):
        cats.generate(llama, inputs, **options)


def test_forward_hook_is_an_error_for_the_compiled_engine():
    model = make_model()
    model.model.norm.register_forward_hook(lambda m, args, out: out)
    with pytest.raises(BackendError, match="hooks"):
        cats.generate(model, make_ids(1, 5), engine="compiled", max_new_tokens=3)


def test_model_of_another_library_is_an_error():
    with pytest.raises(UnsupportedModelError):
        cats.generate(nn.Linear(2, 2), make_ids(1, 5))


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_of_given_tokens_are_those_of_one_pass_over_them(llama, engine):
    ids = make_ids(1 if engine == "stream" else 2, 20)
    expected = logits(llama, ids)[:, 7:]
    torch.testing.assert_close(
        cats.Decoder(llama, engine=engine).logits(ids, prompt_length=7), expected
    )


def test_logits_of_as_many_tokens_as_a_window_holds(llama):
    ids = make_ids(1, 256)
    found = cats.Decoder(llama).logits(ids, prompt_length=250)
    torch.testing.assert_close(found, logits(llama, ids)[:, 250:])


def test_asking_for_logits_leaves_the_conversation_alone(llama):
    ids = make_ids(1, 9)
    decoder, expected = cats.Decoder(llama), cats.generate(llama, ids, max_new_tokens=8, **GREEDY)
    first = decoder.generate(ids, max_new_tokens=4, **GREEDY)
    decoder.logits(make_ids(3, 12, seed=1), prompt_length=5)
    assert torch.equal(decoder.generate(first, max_new_tokens=4, **GREEDY), expected)


def test_logits_without_a_token_after_the_prompt_are_an_error(llama):
    with pytest.raises(ConfigError, match="shorter than the 9 tokens"):
        cats.Decoder(llama).logits(make_ids(1, 9), prompt_length=9)


def test_rows_say_why_they_ended(llama):
    decoder, ids = cats.Decoder(llama), make_ids(2, 5)
    assert decoder.reasons == []
    free = decoder.generate(ids, max_new_tokens=20, **GREEDY)
    assert decoder.reasons == ["length", "length"]
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=int(free[0, 9]))
    decoder.generate(ids, max_new_tokens=20, **options)
    assert decoder.reasons[0] == "stop"


def test_cancelled_answer_ends_and_the_next_one_is_right(llama):
    decoder, ids, seen = cats.Decoder(llama), make_ids(1, 5), []

    def cancel(tokens):
        seen.append(int(tokens))
        if len(seen) == 4:
            thread = threading.Thread(target=decoder.cancel)
            thread.start()
            thread.join()

    short = decoder.generate(ids, max_new_tokens=20, callback=cancel, **GREEDY)
    assert decoder.reasons == ["cancelled"]
    assert short.shape == (1, 9)
    expected = reference(llama, ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(short, expected[:, :9])
    assert torch.equal(decoder.generate(ids, max_new_tokens=20, **GREEDY), expected)


def test_old_stream_that_is_dropped_late_leaves_the_newer_conversation_alone():
    model = make_model()
    lengths = count_passes(model)
    decoder = cats.Decoder(model)
    old = decoder.stream(make_ids(1, 8), max_new_tokens=20, **GREEDY)
    next(old)
    newer = decoder.generate(make_ids(1, 30, seed=1), max_new_tokens=10, **GREEDY)
    old.close()
    prompt = torch.cat([newer, make_ids(1, 2)], 1)
    lengths.clear()
    answer = decoder.generate(prompt, max_new_tokens=10, **GREEDY)
    assert max(lengths) == 3  # the newest token of the answer before, and both new ones
    assert torch.equal(answer, reference(model, prompt, max_new_tokens=10, **GREEDY))
