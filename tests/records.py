"""Records of measurements for tests: whole ones, of which a test says what matters to it."""

from cats.results import (
    DemoTime,
    FirstTokenTime,
    LaunchTime,
    MLPTime,
    Moment,
    PeakMemory,
    Perplexity,
    StartUpTime,
    TaskScore,
    TokenTime,
)

MEASURED = dict(low=1.0, high=1.0, samples=3, environment={"device": "a GPU"})
_VARIANT = dict(
    model="a model", batch=1, prompt_length=8, new_tokens=8, dtype="bfloat16", variant="stream",
    sparsity=0.0,
)  # fmt: skip


def _make(kind, value, default, changes):
    measured = MEASURED | {"low": value, "high": value}
    return kind(value=value, **(measured | default | changes))


def mlp_time(value, **changes):
    default = dict(
        hidden_size=64, intermediate_size=128, dtype="bfloat16", batch=1, variant="cuda",
        neighbour="none", sparsity=0.5, kept_share=0.5, limit_us=40.0, copies=2, calls=2,
    )  # fmt: skip
    return _make(MLPTime, value, default, changes)


def token_time(value, **changes):
    default = dict(realized_sparsity=0.0, bytes=1e6, limit_ms=2.0, dense_ms=4.0)
    return _make(TokenTime, value, _VARIANT | default, changes)


def first_token_time(value, **changes):
    return _make(FirstTokenTime, value, _VARIANT, changes)


def start_up_time(value, **changes):
    return _make(StartUpTime, value, _VARIANT | {"compilations": 0}, changes)


def peak_memory(value, **changes):
    return _make(PeakMemory, value, _VARIANT | {"over_dense_weights": 0.01}, changes)


def launch_time(value, **changes):
    default = dict(kernel="linear", calls=2.0, share=0.5)
    return _make(LaunchTime, value, _VARIANT | default, changes)


def moment(value, **changes):
    default = dict(
        model="tiny", dtype="bfloat16", sparsity=0.5, context=96, launch="MLP", event="end"
    )
    return _make(Moment, value, default, changes)


def _quality(variant):
    method, _, target = variant.partition("-")
    return dict(
        model="a model", dtype="bfloat16", calibration_text="c4.txt.gz", calibration_samples=8,
        calibration_length=64, calibration_seed=0, method=method,
        target_sparsity=float(target) / 100 if target else None, variant=variant,
    )  # fmt: skip


def perplexity(variant, value, **changes):
    default = dict(
        text="wiki.txt.gz", tokens=1000, block=64, realized_sparsity=None, mlp_share=1.0,
        token_bytes=1000,
    )  # fmt: skip
    return _make(Perplexity, value, _quality(variant) | default, changes)


def task_score(variant, value, **changes):
    default = dict(
        quantity="acc", samples=1000, task="piqa", split="test", stderr=0.02, difference=0.0,
        difference_stderr=0.012,
    )  # fmt: skip
    return _make(TaskScore, value, _quality(variant) | default, changes)


def demo_time(value, **changes):
    default = dict(
        model="tiny", dtype="float32", seed=0, calibration_tokens=64, variant="model.generate",
        sparsity=0.0, realized_sparsity=0.0, prompt="a prompt",
    )  # fmt: skip
    return _make(DemoTime, value, default, changes)
