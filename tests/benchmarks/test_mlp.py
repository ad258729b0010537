import pytest
import torch
from typer.testing import CliRunner

from cats import ops
from cats.benchmarks import mlp, mlp_variants, timing
from cats.benchmarks.mlp import Case, Weights, check, measure
from cats.cli import bench
from cats.errors import BackendError, ConfigError
from cats.results import read_results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny_case(**changes):
    shape = dict(hidden_size=32, intermediate_size=64, dtype=torch.float32, device=DEVICE)
    variants = dict(backends=("reference",), sparsities=(0.5,), compiled=False)
    return Case(**shape | variants | dict(rounds=2, size=2**20) | changes)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Few copies of the weights: a tiny MLP would need thousands to leave a real cache."""
    monkeypatch.setattr(mlp, "cache_size", lambda device: 2**14)


@pytest.fixture
def results():
    return list(measure(tiny_case()))


def test_every_variant_and_sparsity_is_measured_beside_the_limit(results):
    bandwidth, *times = results
    assert bandwidth.quantity == "read_bandwidth"
    assert bandwidth.value > 0
    measured = {
        (r.settings["variant"], r.settings["sparsity"])
        for r in times
        if r.settings["neighbour"] == "none"
    }
    at_zero = {(name, 0.0) for name in ("reference", "dense_eager", "dense_merged")}
    assert measured == at_zero | {("reference", 0.5)}
    assert all(0 < r.low <= r.value <= r.high for r in times if r.settings["neighbour"] == "none")


def test_the_limit_counts_the_kept_neurons(results):
    limits = {
        (r.settings["variant"], r.settings["sparsity"]): r.settings["limit_us"] for r in results[1:]
    }
    half = next(r for r in results[1:] if r.settings["sparsity"] == 0.5).settings["kept_share"]
    assert half == pytest.approx(0.5, abs=0.02)
    ratio = limits["reference", 0.5] / limits["reference", 0.0]
    assert ratio == pytest.approx((1 + 2 * half) / 3)


@pytest.mark.parametrize(("cache", "copies"), [(10 * 3 * 32 * 64 * 4, 40), (1, 2)])
def test_weights_are_rotated_beyond_the_cache(monkeypatch, cache, copies):
    monkeypatch.setattr(mlp, "cache_size", lambda device: cache)
    _, *times = measure(tiny_case())
    assert {r.settings["copies"] for r in times} == {copies}


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    case = tiny_case()
    right = ops.gated_mlp
    monkeypatch.setattr(ops, "gated_mlp", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(BackendError, match=r"reference is wrong .* it is not timed"):
        list(measure(case))


def test_nan_never_passes_the_check():
    x = torch.randn(1, 32, device=DEVICE)
    weights = Weights.random(tiny_case())
    with pytest.raises(BackendError, match="relative error nan"):
        check("broken", lambda x, w: x * torch.nan, x, weights)


def test_the_papers_kernels_are_right():
    pytest.importorskip("triton")
    for D, F in ((1, 1), (37, 61), (64, 96)):
        case = tiny_case(hidden_size=D, intermediate_size=F)
        x = torch.randn(1, D, device=DEVICE)
        for sparsity in (0.0, 0.5):
            check(mlp.PAPER, mlp_variants.paper, x, Weights.random(case).at(x, sparsity))


def test_the_papers_kernels_take_one_token():
    with pytest.raises(BackendError, match="one token"):
        list(measure(tiny_case(backends=(mlp.PAPER,), batch=2)))


def test_default_backends_are_those_that_take_the_case(monkeypatch):
    monkeypatch.setattr(mlp_variants, "why_refused", lambda *_: "not live")
    with pytest.raises(BackendError, match=r"no sparse backend takes this case.*not live"):
        list(measure(tiny_case(backends=())))


def test_command_appends_a_sweep_to_the_file(tmp_path):
    file = tmp_path / "results.jsonl"
    command = (
        "mlp --shape 16x24 --shape 8x8 --batch 1,2 --sparsity 0.5 --dtype float32 --rounds 2 "
        "--backend reference --read-mib 1 --no-compiled --device"
    )
    arguments = [*command.split(), DEVICE, "-o", str(file)]
    outcome = CliRunner().invoke(bench.app, arguments)
    assert outcome.exit_code == 0, outcome.output
    measured = {(r.settings["hidden_size"], r.settings["batch"]) for r in read_results(file)}
    assert measured == {(16, 1), (16, 2), (8, 1), (8, 2)}
    shown = CliRunner().invoke(bench.app, ["results", "show", str(file)])
    assert shown.exit_code == 0
    assert "16x24" in shown.output


@pytest.mark.parametrize(
    "arguments",
    [
        "--shape 16",
        "--shape 16x24 --dtype int8",
        "--shape 16x24 --sparsity half",
        "--shape 16x24 --sparsity 1",
        "--shape 16x24 --batch 0",
    ],
)
def test_options_that_cannot_be_right_are_refused(arguments):
    outcome = CliRunner().invoke(bench.app, ["mlp", *arguments.split()])
    assert isinstance(outcome.exception, ConfigError)


def test_passes_are_timed_in_turns():
    order = []
    passes = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = timing.time_passes(passes, 4, device=torch.device("cpu"), rounds=3)
    assert order == list("ab" * 4)
    assert timings["a"].samples == 3
