import copy

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import cats
from cats.errors import ConfigError, DataError, ModelMismatchError, UnsupportedModelError
from tests import models


def _padded(ids, lengths, side):
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, lengths, strict=True):
        row[slice(length) if side == "right" else slice(len(row) - length, None)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_counts(side):
    model = models.Body(models.MLP(), models.MLP())
    batch = _padded(models.make_ids(3, 8), [8, 3, 5], side)
    rows = [
        row[mask.bool()][None]
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    padded, plain = cats.collect(model, [batch]), cats.collect(model, rows)
    assert (padded.tokens, padded.blocks, padded.text_hash) == (16, 3, plain.text_hash)
    for name, counts in plain.counts.items():
        assert counts.sum() == 16 * models.F
        # products of another batch shape may differ in the last bit
        assert (padded.counts[name] - counts).abs().sum() <= 0.01 * 16 * models.F


def test_dense_model_is_left_as_it_was():
    model, ids = models.make_model().train(), models.make_ids()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    cats.collect(model, [ids])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_hooks_are_gone_after_an_error():
    model = models.make_model()
    with pytest.raises(DataError):
        cats.collect(model, [models.make_ids(), torch.rand(2, 3)])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_realised_sparsity_on_the_calibration_text_is_the_target():
    model, ids = models.make_model(), models.make_ids(16, 64)
    statistics = cats.collect(model, [ids])
    for target in (0.1, 0.5, 0.9):
        cats.sparsify_(model, statistics.config(target))
        # later MLPs see what the sparse ones before them give
        first = next(iter(cats.metrics.realized_sparsity(model, [ids]).values()))
        assert abs(first - target) <= 0.001
        cats.densify_(model)


def test_unknown_method_and_missing_target_are_refused():
    model = models.Body(models.MLP())
    with pytest.raises(ConfigError, match="no method"):
        cats.calibrate(model, [models.make_ids()], target_sparsity=0.5, method="magic")
    with pytest.raises(ConfigError, match="needs target_sparsity"):
        cats.calibrate(model, [models.make_ids()])
    with pytest.raises(ConfigError, match="has no"):
        cats.calibrate(model, [models.make_ids()], target_sparsity=0.5, method="relu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_activations_are_refused(value):
    model = models.Body(models.MLP(bias=True))
    model.layers[0].gate_proj.bias.data[0] = value
    with pytest.raises((DataError, UnsupportedModelError)):
        cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)


def test_nan_that_only_the_text_shows_names_the_mlp():
    model = models.Body(models.MLP())
    model.embed.weight.data[7] = float("nan")
    with pytest.raises(DataError, match=r"layers\.0: .* NaN or infinite"):
        cats.calibrate(model, [torch.full((1, 4), 7)], target_sparsity=0.5)


def test_no_tokens_are_refused():
    model = models.Body(models.MLP())
    ids = models.make_ids(1, 4)
    for batches in ([], [{"input_ids": ids, "attention_mask": ids * 0}]):
        with pytest.raises(DataError, match="no tokens"):
            cats.calibrate(model, batches, target_sparsity=0.5)


def test_mlp_that_never_runs_is_named():
    model = models.Body(models.MLP())
    model.vision = nn.Sequential(models.MLP())
    with pytest.raises(DataError, match=r"vision\.0 never ran"):
        cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    cats.calibrate(model, [models.make_ids()], target_sparsity=0.5, exclude=["vision*"])


def test_sparse_model_is_refused():
    model = models.Body(models.MLP())
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))
    with pytest.raises(UnsupportedModelError, match="sparse already"):
        cats.collect(model, [models.make_ids()])


@pytest.fixture
def offloaded(tmp_path):
    """A model, and the same one with its second layer on disk."""
    model = models.make_model()
    model.save_pretrained(tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    where |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    twin = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=where, offload_folder=tmp_path / "offload"
    )
    assert next(twin.model.layers[1].parameters()).is_meta
    return model, twin


def test_offloaded_model_is_calibrated_applied_and_measured_like_the_whole_one(offloaded):
    model, twin = offloaded
    ids = models.make_ids()
    config, other = (cats.calibrate(m, [ids], target_sparsity=0.5) for m in offloaded)
    for name, threshold in config.thresholds.items():
        assert torch.equal(other.thresholds[name], threshold)
        assert torch.equal(other.fingerprints[name], config.fingerprints[name])
    for m in offloaded:
        cats.sparsify_(m, config)
    assert not any(b.is_meta for n, b in twin.named_buffers() if n.endswith("threshold"))
    assert torch.equal(models.logits(twin, ids), models.logits(model, ids))
    shares = cats.metrics.realized_sparsity(model, [ids])
    assert cats.metrics.realized_sparsity(twin, [ids]) == shares
    assert cats.metrics.perplexity(twin, [ids]) == cats.metrics.perplexity(model, [ids])


def test_offloaded_weights_of_another_model_are_refused(offloaded):
    config = cats.calibrate(models.make_model(), [models.make_ids()], target_sparsity=0.5)
    with pytest.raises(ModelMismatchError, match="weights"):
        cats.sparsify_(offloaded[1], config)


def test_embedding_on_disk_does_not_move_the_tokens_away():
    model, ids = models.make_model(), models.make_ids()
    expected = cats.calibrate(model, [ids], target_sparsity=0.5)
    accelerate.cpu_offload(model, torch.device("cpu"))
    config = cats.calibrate(model, [ids], target_sparsity=0.5)
    assert all(torch.equal(config.thresholds[n], t) for n, t in expected.thresholds.items())


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = models.make_model()
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens\.weight is on the meta device"):
        cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    with pytest.raises(UnsupportedModelError, match="load the weights"):
        cats.metrics.perplexity(model, [models.make_ids()])
