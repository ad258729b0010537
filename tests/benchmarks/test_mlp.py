import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from cats import ops
from cats.benchmarks import mlp, mlp_codes, mlp_variants, timing
from cats.benchmarks.mlp import Case, Weights, check, measure
from cats.cli import bench
from cats.errors import BackendError, ConfigError
from cats.report.mlp import panels
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


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, None)])
def test_codes_are_timed_beside_dense_numbers_with_limits_of_their_own(bits, group_size):
    case = tiny_case(bits=bits, group_size=group_size, backends=("reference", "dense"))
    bandwidth, *times = measure(case)
    assert {(r.bits, r.group_size) for r in (bandwidth, *times)} == {(bits, group_size)}
    limits = {(r.variant, r.sparsity): r.limit_us for r in times if r.neighbour == "none"}
    dense = {(name, 0.0) for name in ("dense_eager", "dense_merged")}
    over_codes = {(name, s) for name in ("reference", "dense") for s in (0.0, 0.5)}
    assert limits.keys() == dense | over_codes
    # codes and float32 scales, of three matrices
    groups = {None: (64 + 64 + 32), 32: 64 + 64 + 2 * 32}[group_size]
    bytes_of_codes = 3 * 32 * 64 * bits / 8 + 4 * groups
    ratio = limits["dense", 0.0] / limits["dense_eager", 0.0]
    assert ratio == pytest.approx(bytes_of_codes / (3 * 32 * 64 * 4))
    assert limits["dense", 0.5] < limits["dense", 0.0]
    (panel,) = (p for p in panels(times) if p.neighbour == "none")
    assert f"int{bits}" in panel.title
    assert panel.sparse_variants == ["reference", "dense"]
    assert not {*panel.dense} - {"dense_eager", "dense_merged", "reference at 0", "dense at 0"}


def test_a_wrong_kernel_over_codes_is_not_timed(monkeypatch):
    right = mlp_codes.packed_gated_mlp
    monkeypatch.setattr(mlp_codes, "packed_gated_mlp", lambda *a: right(*a) * 1.001)
    with pytest.raises(BackendError, match=r"dense is wrong .* it is not timed"):
        list(measure(tiny_case(bits=8, backends=("dense",))))


def test_torch_int4_says_why_it_does_not_run():
    shape = dict(hidden_size=128, intermediate_size=256, dtype=torch.bfloat16, device="cuda")
    case = Case(**shape, bits=4, group_size=32)
    assert mlp_codes.torch_int4_refusal(case) is None
    for changes, word in (
        (dict(bits=8), "4 bits"),
        (dict(dtype=torch.float16), "bfloat16"),
        (dict(device="cpu"), "GPU"),
        (dict(hidden_size=192), "multiples of 128"),
        (dict(group_size=None), "groups"),
    ):
        assert word in mlp_codes.torch_int4_refusal(dataclasses.replace(case, **changes))


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


@pytest.mark.parametrize("options", ["", "--bits 4 --group 32"])
def test_command_appends_a_sweep_to_the_file(tmp_path, options):
    file = tmp_path / "results.jsonl"
    command = (
        f"mlp --shape 32x64 --shape 64x32 --batch 1,2 --sparsity 0.5 --dtype float32 --rounds 2 "
        f"--backend reference --read-mib 1 --no-compiled {options} --device"
    )
    arguments = [*command.split(), DEVICE, "-o", str(file)]
    outcome = CliRunner().invoke(bench.app, arguments)
    assert outcome.exit_code == 0, outcome.output
    measured = {(r.settings["hidden_size"], r.settings["batch"]) for r in read_results(file)}
    assert measured == {(32, 1), (32, 2), (64, 1), (64, 2)}
    shown = CliRunner().invoke(bench.app, ["results", "show", str(file)])
    assert shown.exit_code == 0
    assert "32x64" in shown.output
    assert ("int4 in groups of 32" in " ".join(shown.output.split())) == bool(options)


@pytest.mark.parametrize(
    "arguments",
    [
        "--shape 16",
        "--shape 16x24 --dtype int8",
        "--shape 16x24 --sparsity half",
        "--shape 16x24 --sparsity 1",
        "--shape 16x24 --batch 0",
        "--shape 16x24 --bits 3",
        "--shape 16x24 --bits 4",
        "--shape 16x24 --group 8",
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
