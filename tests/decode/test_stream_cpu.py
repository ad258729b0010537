"""The engine ``stream`` on a CPU: a token in one call, by a team of threads."""

import ctypes
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

import cats
from cats.decode.engines import make_engine
from cats.decode.forward import prefill
from cats.decode.state import State
from cats.decode.stream.cpu_chain import CpuChain
from cats.decode.stream.layout import lay_out_
from cats.decode.stream.spec import read_spec
from cats.errors import BackendError
from cats.ops import cpu, step
from tests.models import FAMILIES, assert_same_tokens, make_ids, make_model
from tests.quantised import quantise_
from tests.test_fusion import two_stage

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the CPU kernels")
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
SETS = [] if cpu.unavailable() else cpu.instruction_sets()
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="sends signals to threads")


@pytest.fixture(autouse=True)
def back_to_the_usual():
    """Threads, processors and instruction set as they were."""
    threads, best = torch.get_num_threads(), cpu.instruction_set()
    yield
    torch.set_num_threads(threads)
    step.pretend_processors(0)
    cpu.select(best)


def use_threads(count):
    """Run steps in so many threads, whatever this machine has."""
    step.pretend_processors(count)
    torch.set_num_threads(count)


def engine_of(model):
    """The engine, whose probe compares each layer and the logits with the model's."""
    with torch.no_grad():
        return make_engine("stream", model)


def sparse_model(config=LlamaConfig, **changes):
    model = make_model(config, **changes)
    cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=0.5))
    return model


def tokens_of(model, ids, engine="stream", **options):
    return cats.generate(model, ids, engine=engine, **{"max_new_tokens": 20, **GREEDY} | options)


def expected_tokens(model, ids, new=20):
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **GREEDY)


# --- the same as the model


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
def test_greedy_tokens_are_those_of_transformers(config):
    model, ids = make_model(config), make_ids(1, 5)
    assert_same_tokens(model, tokens_of(model, ids), expected_tokens(model, ids), tie=1e-3)
    assert cats.Decoder(model).engine == "stream"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [Gemma2Config, Qwen3Config], ids=lambda c: c.__name__)
def test_16_bit_layers_are_those_of_the_model(config, dtype):
    engine_of(make_model(config).to(dtype))


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_computes_layers_of_odd_sizes(name):
    cpu.select(name)
    sizes = dict(hidden_size=84, intermediate_size=131, num_attention_heads=6, head_dim=14)
    engine_of(sparse_model(num_key_value_heads=2, **sizes))
    engine_of(make_model(**sizes, num_key_value_heads=6).to(torch.bfloat16))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("int4", dict(group_size=32, scale_dtype=torch.float16)),
        ("int4 zeros", dict(group_size=128)),
        ("int4 shifts", dict(group_size=32)),
        ("int8 rows", {}),
        ("int8 groups", dict(group_size=64, scale_dtype=torch.bfloat16)),
    ],
)
def test_every_instruction_set_computes_layers_of_codes(name, kind, changes):
    cpu.select(name)
    sizes = dict(hidden_size=132, intermediate_size=97, num_attention_heads=4, head_dim=20)
    engine_of(quantise_(make_model(**sizes), kind, **changes))


def test_masks_on_up_and_on_products_are_those_of_the_modules():
    model = sparse_model(num_hidden_layers=2)
    for layer, router in zip(model.model.layers, ("up", "gate"), strict=True):
        layer.mlp = two_stage(router, 0.05)[0]
    engine_of(model)
    model.model.layers[0].mlp.ignores_up = True
    with pytest.raises(BackendError, match="layer 0 differs"):
        engine_of(model)


def test_texts_beyond_a_window_and_many_runs_of_slots_are_those_of_the_model():
    model = make_model(MistralConfig, sliding_window=9, max_position_embeddings=2048)
    ids = make_ids(1, 30).clamp(min=1)  # 0 is padding
    assert_same_tokens(model, tokens_of(model, ids), expected_tokens(model, ids), tie=1e-3)
    model, ids = make_model(max_position_embeddings=2048), make_ids(1, 1300).clamp(min=1)
    assert_same_tokens(model, tokens_of(model, ids), expected_tokens(model, ids), tie=1e-3)


def test_sampled_tokens_scores_and_ends_are_those_of_the_engine_eager():
    model, ids = make_model(), make_ids(1, 5)
    sampled = dict(do_sample=True, top_k=20, temperature=0.8, repetition_penalty=1.2, seed=3)
    expected = tokens_of(model, ids, engine="eager", **sampled)
    assert tokens_of(model, ids, **sampled).equal(expected)
    greedy = tokens_of(model, ids)
    ending = dict(eos_token_id=int(greedy[0, 11]), pad_token_id=7)
    assert tokens_of(model, ids, **ending).equal(tokens_of(model, ids, engine="eager", **ending))
    decoders = [cats.Decoder(model, engine=engine) for engine in ("stream", "eager")]
    text = make_ids(1, 12)
    logits = [decoder.logits(text, prompt_length=5) for decoder in decoders]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_not_a_number_is_chosen_first_as_by_torch():
    model, ids = make_model(), make_ids(1, 5)
    decoder = cats.Decoder(model, engine="stream")
    decoder.generate(ids, max_new_tokens=2, **GREEDY)
    with torch.no_grad():
        model.lm_head.weight[[9, 77]] = torch.nan
    assert decoder.generate(ids, max_new_tokens=4, **GREEDY)[0, 5:].eq(9).all()


# --- what does not fit


def test_other_formula_is_refused_and_another_engine_runs():
    class Scaled(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return 1.1 * self.mlp(x)

    model, ids = make_model(), make_ids(1, 5)
    model.model.layers[1].mlp = Scaled(model.model.layers[1].mlp)
    strides = [p.stride() for p in model.parameters()]
    with pytest.raises(BackendError, match="layer 1 differs from its kernels"):
        engine_of(model)
    assert [p.stride() for p in model.parameters()] == strides
    assert cats.Decoder(model).engine == "eager"
    actual = tokens_of(model, ids, engine="auto")
    assert_same_tokens(model, actual, expected_tokens(model, ids), tie=1e-3)


def test_several_rows_run_on_another_engine():
    model = make_model()
    assert cats.Decoder(model).engine_for(2) == "eager"
    with pytest.raises(BackendError, match="one row"):
        tokens_of(model, make_ids(2, 5))
    assert tokens_of(model, make_ids(2, 5), engine="auto").shape == (2, 25)


def test_written_weights_are_seen_and_layouts_come_back():
    model, ids = make_model(), make_ids(1, 5)
    strides = [p.stride() for p in model.parameters()]
    decoder = cats.Decoder(model)
    decoder.generate(ids, max_new_tokens=3, **GREEDY)
    assert [p.stride() for p in model.parameters()] != strides
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-2)
    actual = decoder.generate(ids, max_new_tokens=20, **GREEDY)
    assert_same_tokens(model, actual, expected_tokens(model, ids), tie=1e-3)
    cats.release(model)
    assert [p.stride() for p in model.parameters()] == strides


# --- threads


def long_model():
    """So many pieces in each part that all threads have some."""
    return sparse_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=3)


def test_one_to_eight_threads_give_the_same_tokens():
    model, ids = long_model(), make_ids(1, 5)
    expected = expected_tokens(model, ids)
    for threads in (1, 2, 3, 8):
        use_threads(threads)
        assert_same_tokens(model, tokens_of(model, ids), expected, tie=1e-3)
    assert step.team_size() >= 7


def test_decoders_at_once_share_the_team():
    use_threads(3)
    models = [long_model() for _ in range(3)]
    ids = make_ids(1, 5)
    expected = [tokens_of(model, ids) for model in models]
    team = step.team_size()
    results = [None] * len(models)

    def decode(index):
        results[index] = [tokens_of(models[index], ids) for _ in range(5)]

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(t, e) for r, e in zip(results, expected, strict=True) for t in r)
    assert step.team_size() == team


@needs_linux
def test_stopped_threads_hold_up_nobody():
    use_threads(3)
    model, ids = long_model(), make_ids(1, 5)
    libc = ctypes.CDLL(None)
    # a thread that gets signal 1 sleeps for a second, wherever it is
    libc.signal.restype = ctypes.c_void_p
    before = libc.signal(1, ctypes.cast(libc.sleep, ctypes.c_void_p))
    try:
        decoder = cats.Decoder(model, engine="stream")
        expected = decoder.generate(ids, max_new_tokens=100, **GREEDY)
        helpers = [task for task in os.listdir("/proc/self/task") if is_helper(task)]
        assert len(helpers) == step.team_size() >= 2
        # by chance, a thread is stopped in the moment in which it copies a result
        for _ in range(3):
            tokens = []
            for token in decoder.stream(ids, max_new_tokens=100, **GREEDY):
                tokens.append(int(token))
                if len(tokens) == 10:
                    for task in helpers:
                        libc.tgkill(os.getpid(), int(task), 1)
                    start = time.perf_counter()
            elapsed = time.perf_counter() - start
            assert tokens == expected[0, 5:].tolist()
            if elapsed < 0.9:
                break
    finally:
        libc.signal(1, ctypes.c_void_p(before))
    assert elapsed < 0.9, "tokens waited for a stopped thread"


def is_helper(task):
    return Path(f"/proc/self/task/{task}/comm").read_text() == "cats step\n"


def chain_after_a_prompt(model):
    """A chain that runs the sixth token of a text again and again."""
    spec = lay_out_(read_spec(model), [], [])
    with torch.inference_mode():
        state = State(model, model.config, 1, 8)
        prefill(model, state, make_ids(1, 5), 0)
        state.start_at(5)
    return CpuChain(spec, state), state


@needs_linux
def test_forked_process_has_a_team_of_its_own():
    model = long_model()
    chain, _state = chain_after_a_prompt(model)
    use_threads(3)
    expected = chain.run(6).clone()
    assert step.team_size() >= 2
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads and fork
        child = os.fork()
    if not child:
        # torch's own threads may not run here
        try:
            is_right = step.team_size() == 0
            chain.run(6)
            is_right &= bytes(chain._logits.numpy()) == bytes(expected.numpy())
            is_right &= step.team_size() == 2
            os.write(writer, b"ok" if is_right else b"no")
        finally:
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 2)
    os.waitpid(child, 0)
    assert answer == b"ok"
    assert chain.run(6).equal(expected)


@needs_linux
def test_threads_follow_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert step.processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= step.processors() <= len(allowed)
