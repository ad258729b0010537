"""Records of measurements for tests, with a default for each field."""

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

_DECODE = dict(model="a model", batch=1, prompt_length=8, new_tokens=8, dtype="bfloat16")
_VARIANT = _DECODE | dict(variant="stream", sparsity=0.0)


def _make(kind, value, default, changes):
    measured = dict(low=value, high=value, samples=3, environment={"device": "a GPU"})
    return kind(value=value, **(measured | default | changes))


def mlp_time(value, **changes):
    mlp = dict(hidden_size=64, intermediate_size=128, dtype="bfloat16", batch=1)
    variant = dict(variant="cuda", neighbour="none", sparsity=0.5, kept_share=0.5, limit_us=40.0)
    return _make(MLPTime, value, mlp | variant | dict(copies=2, calls=2), changes)


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
    model = dict(model="tiny", dtype="bfloat16", sparsity=0.5, context=96)
    return _make(Moment, value, model | dict(launch="MLP", event="end"), changes)


def _quality(variant):
    method, _, target = variant.partition("-")
    target_sparsity = float(target) / 100 if target else None
    calibration = dict(text="c4.txt.gz", samples=8, length=64, seed=0)
    return dict(
        model="a model",
        dtype="bfloat16",
        variant=variant,
        method=method,
        target_sparsity=target_sparsity,
        **{f"calibration_{name}": value for name, value in calibration.items()},
    )


def perplexity(variant, value, **changes):
    text = dict(text="wiki.txt.gz", tokens=1000, block=64)
    reads = dict(realized_sparsity=None, mlp_share=1.0, token_bytes=1000)
    return _make(Perplexity, value, _quality(variant) | text | reads, changes)


def task_score(variant, value, **changes):
    task = dict(quantity="acc", samples=1000, task="piqa", split="test")
    errors = dict(stderr=0.02, difference=0.0, difference_stderr=0.012)
    return _make(TaskScore, value, _quality(variant) | task | errors, changes)


def profile(threshold):
    """The block of a profile's file, with two equal layers."""
    layer = dict(
        name="model.layers.0.mlp.act_fn",
        activation="silu",
        threshold=threshold,
        zero=0.5,
        near_zero=0.6,
        histogram=[0.5] + [0.01] * 50,
        by_position=[0.5] * 16,
        union={"2": 0.3, "4": 0.2},
        overlap=0.6,
    )
    header = dict(version=1, kind="profile", model="tiny", text="wiki.txt", cats={"method": "cats"})
    measured = dict(layers=[layer, layer], tokens=1000, near=0.1, by_token={"50%": 0.5})
    return header | measured


def demo_time(value, **changes):
    model = dict(model="tiny", dtype="float32", seed=0, calibration_tokens=64)
    loop = dict(variant="model.generate", sparsity=0.0, realized_sparsity=0.0, prompt="a prompt")
    return _make(DemoTime, value, model | loop, changes)
