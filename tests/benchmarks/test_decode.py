import math

import pytest
import torch

import cats
from cats.benchmarks import decode, decode_variants
from cats.benchmarks.copies import copy_for_fusion
from cats.benchmarks.decode import Case, measure
from cats.benchmarks.decode_check import divergence
from cats.benchmarks.decode_runs import run_loop, run_transformers
from cats.benchmarks.launches import profile_steps, summarize
from cats.benchmarks.shapes import random_model
from cats.errors import BackendError, ConfigError
from cats.results import Result
from tests.models import make_ids, make_model

LENGTHS = dict(prompt_length=8, new_tokens=6, rounds=2, read_bytes=2**20)
TINY = dict(model="tiny", sparsities=(0.0, 0.5)) | LENGTHS


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    return list(measure(make_model(), make_ids(8), Case(**TINY)))


def times(results):
    return {
        (r.settings["variant"], r.settings["sparsity"]): r for r in results if r.quantity == "time"
    }


def test_every_variant_is_measured_with_its_limit(results):
    assert [Result.from_json(r.to_json()) for r in results] == results
    timed = times(results)
    assert timed.keys() == {("stream", 0.0), ("generate", 0.0), ("stream", 0.5), ("generate", 0.5)}
    dense, sparse = timed["stream", 0.0].settings, timed["stream", 0.5].settings
    assert dense["realized_sparsity"] == 0
    assert 0.2 < sparse["realized_sparsity"] < 0.8
    # of each neuron that is dropped, a row of up and a column of down are not read
    dropped = sparse["realized_sparsity"] * 2 * (2 * 40 * 16) * 4
    assert dense["bytes"] - sparse["bytes"] == pytest.approx(dropped)


def test_each_stage_is_named_before_it_begins():
    stages = []
    case = Case(**TINY | {"generate": False})
    list(measure(make_model(), make_ids(8), case, on_stage=stages.append))
    expected = """\
timing a read of memory
calibrating on 256 tokens
dense: running the modules, for the check
dense, auto: making the engine
dense, stream: first run
dense, stream: round 1 of 2
dense, stream: round 2 of 2
dense, stream: check
cats-50: running the modules, for the check
cats-50, auto: making the engine
cats-50, stream: first run
cats-50, stream: round 1 of 2
dense, stream: round 1 of 2
cats-50, stream: round 2 of 2
dense, stream: round 2 of 2
cats-50, stream: check"""
    assert stages == expected.splitlines()


def test_every_engine_is_checked_against_the_modules(results):
    for (variant, _), result in times(results).items():
        if variant == "generate":
            assert "kl" not in result.settings
        else:
            assert abs(result.settings["kl"]) < 1e-5
            assert result.settings["same_choice"] == 1
            assert result.settings["sparsity_error"] == 0


def test_engine_that_computes_something_else_shows_in_its_check(monkeypatch):
    real = cats.Decoder.logits
    monkeypatch.setattr(cats.Decoder, "logits", lambda *a, **k: real(*a, **k).roll(1, dims=-1))
    settings = times(measure(make_model(), make_ids(8), Case(**TINY | {"sparsities": (0.5,)})))
    assert settings["stream", 0.5].settings["kl"] > 0.01
    assert settings["stream", 0.5].settings["same_choice"] < 0.5


def test_divergence_of_nan_is_nan_and_of_equals_is_zero():
    logits = torch.randn(1, 3, 5)
    exact = logits.log_softmax(-1)
    assert divergence(exact, logits) == pytest.approx(0, abs=1e-6)
    logits[0, 1, 2] = torch.nan
    assert math.isnan(divergence(exact, logits))


def test_start_up_is_a_time_that_passed(results):
    starts = [r.value for r in results if r.quantity == "start_up"]
    assert len(starts) == 4
    assert min(starts) > 0


def test_dense_loop_of_the_same_minute_is_compared_with(results):
    timed = times(results)
    assert timed["stream", 0.0].settings["dense_ms"] == timed["stream", 0.0].value
    assert timed["stream", 0.5].settings["dense_ms"] > 0
    first = {
        r.settings["sparsity"]: r
        for r in results
        if r.quantity == "time_to_first_token" and r.settings["variant"] == "stream"
    }
    assert first[0.0].settings["dense_ms"] == first[0.0].value
    assert first[0.5].settings["dense_ms"] > 0
    alone = times(measure(make_model(), make_ids(8), Case(**TINY | {"sparsities": (0.5,)})))
    assert alone["stream", 0.5].settings["dense_ms"] is None


def test_results_of_a_sparsity_come_before_the_next_one_is_run(monkeypatch):
    def stop(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "copy_for_fusion", stop)
    results = []
    with pytest.raises(KeyboardInterrupt):
        results.extend(measure(make_model(), make_ids(8), Case(**TINY)))
    assert times(results).keys() == {("stream", 0.0), ("generate", 0.0)}


def test_engine_that_cannot_run_a_model_is_left_out_with_the_reason(monkeypatch):
    def refuse(*_, **options):
        raise BackendError("not this one")

    monkeypatch.setattr(decode_variants, "run_loop", refuse)
    with pytest.warns(UserWarning, match="stream at 0% is left out: not this one"):
        timed = times(measure(make_model(), make_ids(8), Case(**TINY | {"sparsities": (0.0,)})))
    assert timed.keys() == {("generate", 0.0)}


def test_engine_that_refuses_a_model_is_left_out_before_it_is_run(monkeypatch):
    def refuse(*_):
        raise BackendError("not this one")

    monkeypatch.setattr("cats.decode.runner.make_engine", refuse)
    with pytest.warns(UserWarning, match="auto at 0% is left out: not this one"):
        timed = times(measure(make_model(), make_ids(8), Case(**TINY | {"sparsities": (0.0,)})))
    assert timed.keys() == {("generate", 0.0)}


def test_sparse_copies_share_what_fusing_leaves_alone():
    model = make_model()
    down = model.model.layers[0].mlp.down_proj
    copied = copy_for_fusion(model)
    ours = {id(p) for p in model.parameters()}
    own = {n for n, p in copied.named_parameters() if id(p) not in ours}
    assert own == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    strides = down.weight.stride()
    cats.sparsify_(copied, cats.calibrate(model, [make_ids()], target_sparsity=0.5))
    cats.fuse_(copied)
    assert down.weight.stride() == strides


def test_a_head_that_is_no_embedding_counts_and_the_embedding_does_not():
    model = make_model()
    result = list(measure(model, make_ids(8), Case(**TINY | {"sparsities": (0.0,)})))[1]
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    # keys and values: layers, heads, head size, slots on average
    cache = 2 * 2 * 1 * 8 * (8 + 3) * 4
    assert result.settings["bytes"] == weights + cache


def test_transformers_is_timed_once_per_token():
    run = run_transformers(make_model(), make_ids(1, 5), min_new_tokens=4, max_new_tokens=4)
    assert run.tokens.shape == (1, 9)
    assert run.times == sorted(run.times)
    assert len(run.times) == 4


def test_each_run_of_the_loop_runs_the_whole_prompt():
    model, ids = make_model(), make_ids(1, 9)
    decoder = cats.Decoder(model)
    run_loop(decoder, ids, max_new_tokens=4, do_sample=False)
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    run_loop(decoder, ids, max_new_tokens=1, do_sample=False)
    hook.remove()
    assert lengths[0] == 9


@pytest.mark.parametrize(
    "change",
    [{name: 1} for name in ("rounds", "generate_rounds")]
    + [{"sparsities": (1.0,)}, {"sparsities": ()}, {"batch": 0}],
    ids=str,
)
def test_cases_that_cannot_be_right_are_errors(change):
    with pytest.raises(ConfigError):
        Case(**TINY | change)


def test_text_that_is_too_short_for_the_prompts_is_an_error():
    with pytest.raises(ConfigError, match="too few"):
        list(measure(make_model(), make_ids(1), Case(**TINY | {"batch": 2})))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they can be timed")
def test_launches_without_a_gpu_are_an_error():
    with pytest.raises(ConfigError, match="CUDA"):
        list(measure(make_model(), make_ids(8), Case(**TINY | {"launches": True})))
    with pytest.raises(ConfigError, match="CUDA"):
        profile_steps(cats.Decoder(make_model()), make_ids(1))


def test_launches_are_summed_by_name_and_gaps_are_what_no_kernel_fills():
    # b overlaps the end of a; nothing runs from 7 to 10
    events = [("a", 0, 4), ("b", 3, 7), ("a", 10, 12), ("b", 12, 12)]
    step = summarize(events, steps=2)
    assert [(x.name, x.time, x.calls) for x in step.launches] == [("a", 3, 1), ("b", 2, 1)]
    assert step.gaps == 1.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_launches_and_memory_of_a_gpu_are_measured(device):
    case = Case(**TINY | {"launches": True, "generate": False})
    results = list(measure(make_model().to(device), make_ids(8), case))
    launches = [r for r in results if r.quantity == "launch" and r.settings["sparsity"] == 0]
    assert sum(r.settings["share"] for r in launches) == pytest.approx(1)
    assert launches[0].value > 0
    peaks = {r.settings["sparsity"]: r for r in results if r.quantity == "peak_memory"}
    assert peaks.keys() == {0.0, 0.5}
    assert peaks[0.0].settings["over_dense_weights"] > 0


def test_unknown_shape_is_an_error():
    with pytest.raises(ConfigError, match="one of"):
        random_model("llama-9", torch.float32, torch.device("cpu"))
