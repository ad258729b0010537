"""Sessions as their users see them: texts, tokens, ends, errors, threads."""

import gc
import os
import threading
import time
import weakref

import pytest
import torch
from transformers import LlamaConfig

import cats
from cats.decode.rows.cache import RowCache
from cats.errors import (
    BackendError,
    ConfigError,
    DataError,
    LogitsError,
    UnsupportedModelError,
)
from cats.metrics import DroppedNeurons
from cats.model.traffic import token_bytes
from tests.models import VOCABULARY, logits, make_ids, make_model, make_tokenizer

ENDLESS = dict(eos_token_id=None)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def sessions(llama, tokenizer):
    with cats.Sessions(llama, tokenizer=tokenizer, rows=4, context=128) as sessions:
        yield sessions


def alone(model, prompt, tokenizer=None, **options):
    """The new tokens of one prompt by itself."""
    ids = cats.generate(model, prompt, tokenizer=tokenizer, **options)
    count = len(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else len(prompt)
    return ids[0, count:].tolist()


def test_text_tokens_and_result_agree_with_generate(sessions, llama, tokenizer):
    session = sessions.open("A cat is", max_new_tokens=12, **ENDLESS)
    expected = alone(llama, "A cat is", tokenizer, max_new_tokens=12, **ENDLESS)
    assert "".join(session) == tokenizer.decode(expected)
    assert list(session.tokens()) == expected
    answer = session.result(10)
    assert (list(answer.tokens), answer.text) == (expected, tokenizer.decode(expected))
    assert (answer.reason, session.reason, answer.prompt_tokens) == ("length", "length", 8)


def test_every_session_has_its_own_options(sessions, llama, tokenizer):
    def no_even(ids, scores):
        scores[:, ::2] = -torch.inf
        return scores

    options = [
        dict(do_sample=True, seed=3, temperature=0.7),
        dict(do_sample=True, seed=3, temperature=0.7, top_k=5),
        dict(repetition_penalty=1.7),
        dict(no_repeat_ngram_size=2, do_sample=True, seed=9, top_p=0.9),
        dict(logits_processor=[no_even]),
        dict(do_sample=True, seed=4, min_p=0.01, repetition_penalty=0.8),
        dict(bad_words_ids=[[5], [6, 7]], min_new_tokens=4, eos_token_id=[*range(100)]),
    ]
    calls = [dict(max_new_tokens=10 + i, **(ENDLESS | o)) for i, o in enumerate(options)]
    opened = [sessions.open("A cat is", **call) for call in calls]
    for session, call in zip(opened, calls, strict=True):
        assert list(session.result(20).tokens) == alone(llama, "A cat is", tokenizer, **call)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_session_gives_the_same_alone_and_among_fifteen_others(llama, seed):
    call = dict(max_new_tokens=30, do_sample=True, seed=seed, **ENDLESS)
    prompt = make_ids(1, 20, seed)[0].tolist()
    with cats.Sessions(llama, rows=16, context=128) as sessions:
        first = sessions.open(prompt, **call).result(20)
        others = [
            sessions.open(make_ids(1, 5 + 6 * i, 50 + i)[0].tolist(), max_new_tokens=30, **ENDLESS)
            for i in range(7)
        ]
        among = sessions.open(prompt, **call)
        others += [
            sessions.open(make_ids(1, 4 + i, 80 + i)[0], max_new_tokens=30, do_sample=True)
            for i in range(8)
        ]
        assert among.result(20).tokens == first.tokens
        [other.result(20) for other in others]
    assert list(first.tokens) == alone(llama, prompt, **call)


def test_a_stop_string_ends_its_session_only(sessions, llama, tokenizer):
    text = tokenizer.decode(alone(llama, "A cat is", tokenizer, max_new_tokens=20, **ENDLESS))
    stop = text[9:11]
    stopped = sessions.open("A cat is", max_new_tokens=20, stop_strings=[stop], **ENDLESS)
    other = sessions.open("A cat is", max_new_tokens=20, **ENDLESS)
    assert stopped.result(10).reason == "stop"
    assert stopped.result().text == text[: text.index(stop) + len(stop)]
    assert other.result(10).text == text


def test_a_padded_prompt_is_the_prompt_without_its_padding(sessions, llama):
    prompt = make_ids(1, 9)[0].tolist()
    padded = {
        "input_ids": torch.tensor([[256] * 4 + prompt]),
        "attention_mask": torch.tensor([[0] * 4 + [1] * 9]),
    }
    session = sessions.open(padded, max_new_tokens=8, **ENDLESS)
    assert session.prompt == tuple(prompt)
    assert list(session.result(10).tokens) == alone(llama, prompt, max_new_tokens=8, **ENDLESS)


# --- ends


def test_cancel_ends_a_session_and_keeps_its_tokens(sessions):
    session = sessions.open("A cat is", max_new_tokens=110, **ENDLESS)
    tokens = session.tokens()
    first = [next(tokens) for _ in range(3)]
    session.cancel()
    answer = session.result(10)
    assert answer.reason == "cancelled"
    assert list(answer.tokens[:3]) == first
    assert len(answer.tokens) < 110


def test_leaving_its_block_ends_a_session(sessions):
    with sessions.open("A cat is", max_new_tokens=110, **ENDLESS) as session:
        next(session.tokens())
    assert session.result(10).reason == "cancelled"


def test_a_session_that_nobody_refers_to_is_cancelled(sessions):
    session = sessions.open("A cat is", max_new_tokens=118, **ENDLESS)
    progress = session._progress
    del session
    gc.collect()
    assert progress.wait(10)
    assert progress.reason == "cancelled"


def test_a_session_keeps_its_sessions_alive(llama):
    answer = (
        cats.Sessions(llama, rows=2, context=64)
        .open([1, 2], max_new_tokens=20, **ENDLESS)
        .result(10)
    )
    assert answer.reason == "length"


def test_sessions_that_nobody_refers_to_end_their_thread_and_free_the_cache(llama):
    sessions = cats.Sessions(llama, rows=2, context=64)
    thread = sessions._thread
    gone = weakref.ref(sessions)
    del sessions
    gc.collect()
    thread.join(10)
    assert gone() is None
    assert not thread.is_alive()


def test_closing_cancels_what_is_open(llama):
    sessions = cats.Sessions(llama, rows=1, context=500)
    running = sessions.open([1], max_new_tokens=490, **ENDLESS)
    waiting = sessions.open([2], max_new_tokens=490, **ENDLESS)
    next(running.tokens())
    sessions.close()
    assert (running.reason, waiting.reason) == ("cancelled", "cancelled")
    with pytest.raises(ConfigError, match="closed"):
        sessions.open([1])
    sessions.close()


def test_a_result_that_is_late_is_a_timeout_and_the_session_goes_on(llama):
    gate = threading.Event()

    def slow(ids, scores):
        gate.wait(10)
        return scores

    with cats.Sessions(llama, rows=2, context=64) as sessions:
        session = sessions.open([1, 2], max_new_tokens=3, logits_processor=[slow], **ENDLESS)
        with pytest.raises(TimeoutError, match="goes on"):
            session.result(0.01)
        gate.set()
        assert session.result(10).reason == "length"


def test_a_kept_error_does_not_keep_the_cache(llama):
    def broken(ids, scores):
        raise KeyError

    sessions = cats.Sessions(llama, rows=2, context=61)
    session = sessions.open([1], logits_processor=[broken])
    with pytest.raises(KeyError) as kept:
        session.result(10)
    sessions.close()
    del session, sessions
    gc.collect()
    assert kept is not None
    assert not buffers_of(61)


def buffers_of(capacity):
    """Keys and values of lines with so many slots."""
    caches = [o for o in gc.get_objects() if type(o) is RowCache and o.capacity == capacity]
    return [buffer for cache in caches for buffer in cache.buffers()]


def freed(gone):
    """Whether an object goes soon: the thread of its sessions may still be in a function."""
    deadline = time.monotonic() + 10
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return gone() is None


def test_what_an_error_was_raised_from_does_not_keep_the_cache():
    def broken(module, arguments, options):
        if arguments[0].shape[1] > 1:
            return  # a prompt, which has another cache
        try:
            raise KeyError
        except KeyError as error:
            # a frame that holds the cache, and is none of those that raise the second error
            holds(error, options)
            raise ValueError("held") from error

    def holds(error, options):
        try:
            cache = options
            raise ZeroDivisionError
        except ZeroDivisionError as second:
            assert cache
            error.__context__ = second

    model = make_model(LlamaConfig)
    sessions = cats.Sessions(model, rows=2, context=67)
    model.model.layers[1].register_forward_pre_hook(broken, with_kwargs=True)
    session = sessions.open([1, 2, 3])
    with pytest.raises(ValueError, match="held") as kept:
        session.result(10)
    sessions.close()
    del session, sessions
    gc.collect()
    assert kept is not None
    assert not buffers_of(67)


def test_a_callback_keeps_its_sessions_alive(llama):
    tokens, done = [], threading.Event()

    def callback(token):
        tokens.append(token)
        if len(tokens) == 20:
            done.set()

    cats.Sessions(llama, rows=2, context=64).open(
        [1, 2], max_new_tokens=20, callback=callback, **ENDLESS
    )
    gc.collect()
    assert done.wait(10)


def test_a_garbage_collection_does_not_wait_for_the_sessions_that_it_ends(llama):
    from cats.decode.tracing import exclusion

    sessions = cats.Sessions(llama, rows=2, context=256)
    session = sessions.open([1], max_new_tokens=250, **ENDLESS)
    next(session.tokens())
    thread = sessions._thread
    with exclusion._free:  # private: a lock that a step needs
        del sessions, session
        gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_session_that_raised_is_freed(llama):
    def broken(ids, scores):
        raise KeyError

    with cats.Sessions(llama, rows=2, context=64) as sessions:
        session = sessions.open([1], logits_processor=[broken])
        gone = weakref.ref(session)
        with pytest.raises(KeyError):
            session.result(10)
        del session
        assert freed(gone)


# --- errors


def test_an_error_arrives_in_its_session_only(sessions):
    def broken(ids, scores):
        if ids.shape[1] > 11:
            raise KeyError("my processor")
        return scores

    bad = sessions.open("A cat is", max_new_tokens=20, logits_processor=[broken], **ENDLESS)
    good = sessions.open("A cat is", max_new_tokens=20, **ENDLESS)
    with pytest.raises(KeyError, match="my processor"):
        bad.result(10)
    with pytest.raises(KeyError, match="my processor"):
        list(bad.tokens())
    assert bad.reason == "error"
    assert good.result(10).reason == "length"


def test_a_callback_gets_each_token(sessions):
    tokens = []
    session = sessions.open("A cat", max_new_tokens=9, callback=tokens.append, **ENDLESS)
    assert session.result(10).tokens == tuple(tokens)


def test_a_callback_that_raises_ends_its_session_only(sessions):
    def callback(token):
        raise ZeroDivisionError("my callback")

    good = sessions.open("A cat is", max_new_tokens=30, **ENDLESS)
    bad = sessions.open("A cat is", max_new_tokens=110, callback=callback, **ENDLESS)
    with pytest.raises(ZeroDivisionError, match="my callback"):
        bad.result(10)
    assert bad.reason == "error"
    assert good.result(10).reason == "length"


def test_a_slow_callback_delays_no_other_session(sessions):
    gate = threading.Event()
    slow = sessions.open("A", max_new_tokens=9, callback=lambda _: gate.wait(20), **ENDLESS)
    assert sessions.open("A cat is", max_new_tokens=30, **ENDLESS).result(10).reason == "length"
    gate.set()
    assert slow.result(10).reason == "length"


def test_logits_that_are_nan_harm_no_other_session_and_no_later_one():
    model = make_model(LlamaConfig)
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan
    with cats.Sessions(model, rows=2, context=64) as sessions:
        good = sessions.open([1, 2, 3], max_new_tokens=20, **ENDLESS)
        bad = sessions.open([5, 77, 6], max_new_tokens=20, do_sample=True, **ENDLESS)
        with pytest.raises(LogitsError, match="NaN"):
            bad.result(10)
        later = sessions.open([9, 8], max_new_tokens=40, **ENDLESS)
        # fills both lines, the one with NaN among them
        third = sessions.open([4], max_new_tokens=40, **ENDLESS)
        for session, prompt in ((good, [1, 2, 3]), (later, [9, 8]), (third, [4])):
            tokens = session.result(10).tokens
            assert list(tokens) == alone(model, prompt, max_new_tokens=len(tokens), **ENDLESS)


def test_a_model_that_raises_for_one_text_harms_no_other_session():
    model = make_model(LlamaConfig)

    def refuse(module, arguments):
        if (arguments[0] == 77).any():
            raise RuntimeError("no 77")

    model.model.embed_tokens.register_forward_pre_hook(refuse)
    with cats.Sessions(model, rows=4, context=64) as sessions:
        good = sessions.open([1, 2, 3], max_new_tokens=20, **ENDLESS)

        def only_77(ids, scores):
            scores[:] = -torch.inf
            scores[:, 77] = 0
            return scores

        bad = sessions.open([5], max_new_tokens=20, logits_processor=[only_77], **ENDLESS)
        with pytest.raises(RuntimeError, match="no 77"):
            bad.result(10)
        assert good.result(10).reason == "length"


def test_slots_that_a_failed_pass_has_written_reach_no_later_session():
    model = make_model(LlamaConfig)
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan

    def refuse(module, arguments):
        if arguments[0].isnan().any():
            raise ArithmeticError("NaN")

    # the first layer has written its keys and values then
    model.model.layers[1].register_forward_pre_hook(refuse)
    with cats.Sessions(model, rows=2, context=64) as sessions:
        for prompt in ([5] * 10 + [77], [5]):
            call = dict(logits_processor=[only(77)]) if len(prompt) == 1 else {}
            with pytest.raises(ArithmeticError):
                sessions.open(prompt, max_new_tokens=5, **call, **ENDLESS).result(10)
        opened = {
            length: sessions.open([9] * length, max_new_tokens=20, **ENDLESS) for length in (2, 30)
        }
        for length, session in opened.items():
            tokens = list(session.result(10).tokens)
            assert tokens == alone(model, [9] * length, max_new_tokens=20, **ENDLESS)


def only(token):
    def processor(ids, scores):
        scores[:] = -torch.inf
        scores[:, token] = 0
        return scores

    return processor


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(prompt=[1] * 100, max_new_tokens=29), ConfigError, "100 tokens and 29 .* 128 in all"),
        (dict(prompt=[[1], [2]]), DataError, "one prompt once, got 2 rows"),
        (dict(prompt=[1], num_return_sequences=2, do_sample=True), DataError, "got 2 rows"),
        (dict(prompt=[1], temprature=1.0), ConfigError, "temprature"),
        (dict(prompt=[VOCABULARY]), DataError, "vocabulary"),
        (dict(prompt=[1], callback=3), ConfigError, "callback"),
        (dict(prompt="A", stop_strings=[""]), ConfigError, "stop_strings"),
    ],
)
def test_a_call_that_cannot_run_is_refused_at_once(sessions, arguments, error, message):
    with pytest.raises(error, match=message):
        sessions.open(**arguments)


def test_stop_strings_without_a_tokenizer_are_refused_at_once(llama):
    with (
        cats.Sessions(llama, rows=2, context=64) as sessions,
        pytest.raises(ConfigError, match="need the tokenizer"),
    ):
        sessions.open([1], stop_strings=["a"])


def test_text_without_a_tokenizer_is_refused(llama):
    with cats.Sessions(llama, rows=2, context=64) as sessions:
        session = sessions.open([1], max_new_tokens=2, **ENDLESS)
        with pytest.raises(ConfigError, match="read tokens"):
            next(iter(session))
        assert session.result(10).text is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rows=0), "positive rows"),
        (dict(context=513), "up to the model's, 512"),
        (dict(context=100, cache_tokens=99), "cache_tokens=99 holds no session of context=100"),
        (dict(longest_wait=0), "positive longest_wait"),
        (dict(engine="eager"), "engine must be one of modules, stream; got 'eager'"),
    ],
)
def test_numbers_out_of_range_are_refused(llama, arguments, message):
    with pytest.raises(ConfigError, match=message):
        cats.Sessions(llama, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_engine_stream_is_refused_without_a_gpu(llama):
    with pytest.raises(BackendError, match="engine stream cannot run rows of this model: "):
        cats.Sessions(llama, rows=2, context=64, engine="stream")


def test_something_else_than_a_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Hugging Face"):
        cats.Sessions(torch.nn.Linear(2, 2))


# --- memory


def test_the_cache_is_the_limit_that_was_asked_for(llama):
    with cats.Sessions(llama, rows=8, context=100, cache_tokens=350) as sessions:
        assert (sessions.rows, sessions.context, sessions.cache_tokens) == (3, 100, 300)
        opened = [sessions.open([i], max_new_tokens=60, **ENDLESS) for i in range(6)]
        for i, session in enumerate(opened):
            expected = alone(llama, [i], max_new_tokens=60, **ENDLESS)
            assert list(session.result(20).tokens) == expected


def test_a_prompt_reuses_what_another_session_left(sessions, llama):
    prompt = make_ids(1, 40)[0].tolist()
    first = sessions.open(prompt, max_new_tokens=10, **ENDLESS).result(10)
    again = [*prompt, *first.tokens, 5, 6]
    second = sessions.open(again, max_new_tokens=10, **ENDLESS).result(10)
    assert (first.reused_tokens, second.reused_tokens) == (0, 49)
    assert list(second.tokens) == alone(llama, again, max_new_tokens=10, **ENDLESS)


def test_a_prompt_reuses_the_beginning_of_a_running_session(sessions, llama):
    shared = make_ids(1, 40)[0].tolist()
    running = sessions.open([*shared, 1], max_new_tokens=80, **ENDLESS)
    next(running.tokens())
    second = sessions.open([*shared, 2], max_new_tokens=10, **ENDLESS).result(10)
    assert second.reused_tokens == 40
    assert list(second.tokens) == alone(llama, [*shared, 2], max_new_tokens=10, **ENDLESS)
    assert list(running.result(10).tokens) == alone(
        llama, [*shared, 1], max_new_tokens=80, **ENDLESS
    )


def test_a_written_weight_is_seen_and_nothing_old_is_reused():
    model = make_model(LlamaConfig)
    prompt = make_ids(1, 40)[0].tolist()
    with cats.Sessions(model, rows=2, context=64) as sessions:
        sessions.open(prompt, max_new_tokens=5, **ENDLESS).result(10)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-3)
        answer = sessions.open(prompt, max_new_tokens=5, **ENDLESS).result(10)
    assert answer.reused_tokens == 0
    assert list(answer.tokens) == alone(model, prompt, max_new_tokens=5, **ENDLESS)


def test_what_a_hook_has_changed_is_seen_and_nothing_old_is_reused():
    model, scale = make_model(LlamaConfig), [1.0]
    model.model.layers[0].register_forward_hook(lambda m, a, output: output * scale[0])
    prompt = make_ids(1, 40)[0].tolist()
    with cats.Sessions(model, rows=2, context=64) as sessions:
        sessions.open(prompt, max_new_tokens=5, **ENDLESS).result(10)
        scale[0] = -2.0
        answer = sessions.open(prompt, max_new_tokens=5, **ENDLESS).result(10)
        assert answer.reused_tokens == 0
        assert list(answer.tokens) == alone(model, prompt, max_new_tokens=5, **ENDLESS)


@pytest.mark.parametrize("change", ["attention", "dtype", "sparse"])
def test_a_change_of_the_models_structure_is_followed(change):
    model = make_model(LlamaConfig)
    prompts = [make_ids(1, length)[0].tolist() for length in (3, 40)]
    with cats.Sessions(model, rows=2, context=64) as sessions:
        [sessions.open(prompt, max_new_tokens=5, **ENDLESS).result(10) for prompt in prompts]
        if change == "attention":
            model.set_attn_implementation("eager")
        elif change == "dtype":
            model.double()
        else:
            cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=0.7))
        opened = [sessions.open(prompt, max_new_tokens=20, **ENDLESS) for prompt in prompts]
        for prompt, session in zip(prompts, opened, strict=True):
            expected = alone(model, prompt, max_new_tokens=20, **ENDLESS)
            assert list(session.result(20).tokens) == expected


def test_a_change_that_no_rows_take_is_an_error_of_the_next_sessions():
    model = make_model(LlamaConfig)
    with cats.Sessions(model, rows=2, context=64) as sessions:
        sessions.open([1], max_new_tokens=2).result(10)
        inner = model.model.layers[0].self_attn
        model.model.layers[0].self_attn = Forgetful(inner)
        with pytest.raises(UnsupportedModelError):
            sessions.open([1], max_new_tokens=2).result(10)
        model.model.layers[0].self_attn = inner
        assert sessions.open([1], max_new_tokens=2, **ENDLESS).result(10).reason == "length"


class Forgetful(torch.nn.Module):
    """Attention that sees no earlier token, and so needs no cache."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def test_a_cache_for_which_there_is_no_memory_is_refused_with_its_size(llama):
    with pytest.raises(BackendError, match=r"70,368,744,177,664 tokens, which takes .* GiB"):
        cats.Sessions(llama, rows=2**40, context=64)


def test_rows_in_bfloat16_choose_what_single_rows_find_likely():
    model = make_model(LlamaConfig, hidden_size=64, head_dim=32).to(torch.bfloat16)
    prompts = [make_ids(1, length, length)[0].tolist() for length in (2, 9, 40, 41, 5)]
    with cats.Sessions(model, rows=5, context=64) as sessions:
        opened = [sessions.open(prompt, max_new_tokens=20, **ENDLESS) for prompt in prompts]
        for prompt, session in zip(prompts, opened, strict=True):
            tokens = list(session.result(20).tokens)
            scores = logits(model, torch.tensor([prompt + tokens]))[0].float()[len(prompt) - 1 : -1]
            chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert (scores.amax(1) - chosen).max() < 0.1 * scores.std()


# --- threads


def test_threads_that_open_at_once_get_their_own_answers(llama):
    expected = {i: alone(llama, [i, 3], max_new_tokens=15, **ENDLESS) for i in range(12)}
    got, start = {}, threading.Barrier(12)
    with cats.Sessions(llama, rows=5, context=64) as sessions:

        def work(i):
            start.wait()
            got[i] = list(sessions.open([i, 3], max_new_tokens=15, **ENDLESS).tokens())

        threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert got == expected


def test_a_decoder_of_the_same_model_may_run_meanwhile(sessions, llama):
    session = sessions.open([1, 2], max_new_tokens=100, **ENDLESS)
    expected = alone(llama, [7, 8], max_new_tokens=30, **ENDLESS)
    assert alone(llama, [7, 8], max_new_tokens=30, **ENDLESS) == expected
    assert list(session.result(20).tokens) == alone(llama, [1, 2], max_new_tokens=100, **ENDLESS)


def test_greedy_sessions_leave_torchs_generator_as_it_is(sessions):
    state = torch.get_rng_state()
    sessions.open([1, 2], max_new_tokens=2).result(10)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_forked_process_is_told_to_make_its_own(sessions):
    session = sessions.open([1, 2], max_new_tokens=120, **ENDLESS)
    next(session.tokens())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sessions.open([1])
        except BackendError:
            sessions.close()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if status == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == (child, 0)
    assert session.result(10).reason == "length"


# --- models whose rows cannot run together


@pytest.fixture(scope="module")
def dynamic():
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return make_model(LlamaConfig, rope_parameters=rope)


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_sessions_of_other_models_run_one_after_the_other(dynamic, tokenizer):
    with pytest.warns(UserWarning, match="one after the other: its rotary frequencies"):
        sessions = cats.Sessions(dynamic, tokenizer=tokenizer, context=128)
    with sessions:
        assert "rotary" in sessions.refusal
        long = sessions.open("A dog", max_new_tokens=60, **ENDLESS)
        stopped = sessions.open("A cat is", max_new_tokens=20, do_sample=True, seed=2, **ENDLESS)
        cancelled = sessions.open("A", max_new_tokens=100, **ENDLESS)
        cancelled.cancel()
        with pytest.raises(KeyError):
            sessions.open("A", stopping_criteria=[lambda *_: {}["x"]]).result(10)
        last = sessions.open("A", max_new_tokens=3, **ENDLESS)
        expected = alone(
            dynamic, "A cat is", tokenizer, max_new_tokens=20, do_sample=True, seed=2, **ENDLESS
        )
        assert list(stopped.result(20).tokens) == expected
        assert long.result(20).reason == last.result(20).reason == "length"
        assert cancelled.result(20).reason == "cancelled"


# --- what a server asks for


def test_logprobs_are_those_of_the_logits_whatever_the_options(sessions, llama):
    prompt = make_ids(1, 9)[0].tolist()
    call = dict(max_new_tokens=6, do_sample=True, seed=1, temperature=0.3, **ENDLESS)
    session = sessions.open(prompt, logprobs=3, **call)
    tokens = list(session.result(10).tokens)
    assert tokens == alone(llama, prompt, **call)
    expected = logits(llama, torch.tensor([prompt + tokens]))[0].log_softmax(-1)
    for i, (token, found) in enumerate(zip(tokens, session.logprobs(), strict=True)):
        row = expected[len(prompt) - 1 + i]
        assert found.chosen == pytest.approx(float(row[token]), abs=1e-4)
        top = row.topk(3)
        assert [t for t, _ in found.top] == top.indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert session.logprobs(4) == session.logprobs()[4:]


def test_logprobs_do_not_change_greedy_tokens(sessions, llama):
    prompt = make_ids(1, 9)[0].tolist()
    session = sessions.open(prompt, logprobs=0, max_new_tokens=8, **ENDLESS)
    assert list(session.result(10).tokens) == alone(llama, prompt, max_new_tokens=8, **ENDLESS)
    assert [found.top for found in session.logprobs()] == [()] * 8


def test_a_negative_number_of_logprobs_is_refused(sessions):
    with pytest.raises(ConfigError, match="expected logprobs >= 0, got -1"):
        sessions.open("A cat is", logprobs=-1)


def test_on_change_is_called_after_each_token_and_at_the_end(sessions):
    seen, opened, ended = [], threading.Event(), threading.Event()

    def on_change():
        assert opened.wait(10)  # the first token may come before open returns
        seen.append((len(session.so_far()), session.reason))
        if session.reason:
            ended.set()

    session = sessions.open([1, 2, 3], max_new_tokens=90, on_change=on_change, **ENDLESS)
    opened.set()
    assert ended.wait(10)
    assert seen[-1] == (90, "length")
    assert len(seen) == 91
    assert session.so_far(88) == session.so_far()[88:]


@pytest.mark.parametrize("fused", [False, True])
def test_counted_reads_are_those_that_the_metric_finds(tokenizer, fused):
    model = make_model()
    ids = make_ids(1, 30)
    cats.sparsify_(model, cats.calibrate(model, [ids], target_sparsity=0.5))
    if fused:
        cats.fuse_(model)
    prompt = ids[0, :12].tolist()
    call = dict(max_new_tokens=12, **ENDLESS)
    with cats.Sessions(model, rows=2, context=64) as sessions:
        plain = sessions.open(prompt, **call)
        counting = sessions.open(prompt, count_reads=True, **call)
        tokens = counting.result(10).tokens
        assert tokens == plain.result(10).tokens
    # the counted steps have run the new tokens number 1 and 9
    assert [number for number, _ in counting.reads] == [2, 10]
    for number, share in counting.reads:
        text = torch.tensor([[*prompt, *tokens[: number - 1]]])
        with DroppedNeurons(model) as dropped:
            logits(model, text)
        before = torch.ones_like(text, dtype=torch.bool)
        before[:, -1] = False
        with DroppedNeurons(model) as earlier:
            earlier.mask = before
            logits(model, text)
        count = text.shape[1]
        of_last = {
            name: share * count - earlier.shares()[name] * (count - 1)
            for name, share in dropped.shares().items()
        }
        layers = ("up_proj", "down_proj")
        read = {f"{n}.{layer}": 1 - s for n, s in of_last.items() for layer in layers}
        assert share == pytest.approx(token_bytes(model, read) / token_bytes(model), abs=0.01)
        assert share < 0.95
