import pytest
import torch
from transformers import LlamaConfig

from cats.benchmarks.timeline import measure, moments
from cats.errors import ConfigError
from cats.results import EVENTS, LAUNCHES
from tests.models import make_ids, make_model


def check_moments(times):
    """Each launch has its events, in order, and none ends before the launch before it."""
    # a linear layer ends with its last weights
    missing = {("q, k, v", "last"), ("output projection", "last")}
    assert set(times) == {(launch, event) for launch in LAUNCHES for event in EVENTS} - missing
    assert all(low <= median <= high for low, median, high in times.values())
    for launch in LAUNCHES:
        assert times[launch, "start"][1] < times[launch, "input"][1] < times[launch, "end"][1]
    ends = [times[launch, "end"][2] for launch in LAUNCHES]
    assert ends == sorted(ends)
    assert ends[0] > 0


def test_moments_are_counted_from_the_end_of_the_layer_before():
    stamps = torch.zeros(4 * 3 + 3, 5, 8, 4, dtype=torch.int64)
    stamps[4, 2, 1, 3] = 10_000  # the first layer's MLP ends
    stamps[8, 0, 0, 3] = 30_000
    stamps[5, :2, 0, 1] = torch.tensor([11_000, 14_000])
    stamps[9, 3, 0, 1] = 30_500
    means = moments(stamps)
    # of the second layer 1, 1, 4, of the third .5
    assert means["q, k, v", "input"] == pytest.approx((0.75, 0.75, 2.25))
    assert means["MLP", "end"] == pytest.approx((20, 20, 20))
    assert ("attention", "start") not in means


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_runs_the_launches_of_a_layer_one_after_the_other():
    model = make_model(LlamaConfig, num_hidden_layers=4).to("cuda", torch.bfloat16)
    options = dict(name="tiny", sparsities=[0, 0.5], context=20, commit="abc")
    results = list(measure(model, make_ids(8), **options))
    for sparsity in (0, 0.5):
        rows = [r for r in results if r.settings["sparsity"] == sparsity]
        names = [(r.settings["launch"], r.settings["event"]) for r in rows]
        times = [(r.low, r.value, r.high) for r in rows]
        check_moments(dict(zip(names, times, strict=True)))


def test_models_that_are_not_on_a_gpu_are_refused():
    model = make_model(LlamaConfig)
    with pytest.raises(ConfigError, match="CUDA device"):
        next(measure(model, make_ids(2), name="tiny", sparsities=[0], context=8))
