import accelerate
import pytest
import torch
from torch import nn

import cats
from cats.evaluation.inputs import InputCounts
from cats.evaluation.traffic import mean_share, token_bytes
from cats.evaluation.variants import Dense, Sparse
from cats.model import find_gated_mlps
from tests import models


@pytest.fixture
def batches():
    return [models.make_ids(4, 64, seed) for seed in range(4)]


@pytest.fixture
def variants(model, batches):
    counts = InputCounts.collect(model, batches)
    return [
        Dense(),
        Sparse(cats.calibrate(model, batches, target_sparsity=0.5)),
        Sparse(cats.calibrate(model, batches, method="relu")),
        counts.uniform(1 / 3),
        counts.teal(1 / 3),
    ]


def test_every_variant_leaves_the_model_dense(model, batches, variants):
    expected = models.logits(model, batches[0])
    for variant in variants:
        with variant.on(model):
            assert torch.equal(models.logits(model, batches[0]), expected) == (
                variant.label == "dense"
            )
        variant.measure(model, batches)
        assert torch.equal(models.logits(model, batches[0]), expected)


def test_variants_at_equal_bytes_read_equal_shares(model, batches, variants):
    shares = {v.label: v.measure(model, batches)[1] for v in variants}
    assert shares["dense"] == 1
    # half of the neurons dropped: all of gate and half of up and down are read
    for label in ("cats-50", "relu", "input-33.3", "teal-33.3"):
        tolerance = 0.06 if label == "relu" else 0.02
        assert shares[label] == pytest.approx(2 / 3, abs=tolerance), label


def test_input_thresholding_drops_the_small_inputs_of_each_matrix(model, batches):
    variant = InputCounts.collect(model, batches).uniform(0.5)
    mlp = find_gated_mlps(model)[0]
    seen = {}
    handles = [
        mlp.module.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: (m, out)})
        )
        for name in mlp.matrices
    ]
    x = torch.randn(1, 200, 16)
    with variant.on(model), torch.no_grad():
        mlp.module(x)
    for handle in handles:
        handle.remove()
    layer, out = seen["gate_proj"]
    threshold = variant.thresholds[mlp.name]["gate_proj"]
    expected = nn.functional.linear(torch.where(x.abs() < threshold, 0, x), layer.weight)
    torch.testing.assert_close(out, expected)


def test_teal_never_loses_more_than_uniform_thresholds_where_it_searched(model, batches):
    counts = InputCounts.collect(model, batches)

    @torch.no_grad()
    def error(variant, mlp):
        x = counts.samples[mlp.name][None]
        exact = mlp.module(x)
        with variant.on(model):
            return float((mlp.module(x) - exact).norm())

    for mlp in counts.mlps:
        assert sum(counts.allocate(mlp, 0.5).values()) / 3 == pytest.approx(0.5)
        assert error(counts.teal(0.5), mlp) <= 1.02 * error(counts.uniform(0.5), mlp)


def test_bytes_of_a_token_count_the_head_once_and_the_embedding_not(model):
    total = sum(4 * p.numel() for p in model.parameters())
    table = 4 * model.get_input_embeddings().weight.numel()
    mlps = sum(4 * p.numel() for m in find_gated_mlps(model) for p in m.module.parameters())
    assert token_bytes(model) == total - table
    half = {f"{m.name}.{name}": 0.5 for m in find_gated_mlps(model) for name in m.matrices}
    assert token_bytes(model, half) == total - table - mlps // 2
    tied = models.make_model(tie_word_embeddings=True)
    assert token_bytes(tied) == sum(4 * p.numel() for p in tied.parameters())
    assert mean_share(model, {}) == 1


def test_offloaded_model_is_evaluated_as_the_one_in_memory(model, batches):
    plain = InputCounts.collect(model, batches)
    expected = [v.measure(model, batches) for v in (plain.uniform(0.3), plain.teal(0.3))]
    accelerate.cpu_offload(model, torch.device("cpu"))
    counts = InputCounts.collect(model, batches)
    actual = [v.measure(model, batches) for v in (counts.uniform(0.3), counts.teal(0.3))]
    assert actual == expected
