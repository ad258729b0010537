import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, LlamaConfig, Phi3Config

import cats
from cats.config import CatsConfig
from cats.errors import ConfigError, FormatError, ModelMismatchError, UnsupportedModelError
from cats.fusion import ReadShares
from cats.methods import METHODS, StagedMethod
from cats.metrics import read_shares
from cats.model import find_gated_mlps
from cats.weights import InputMask
from tests import models

STAGED = [name for name, method in METHODS.items() if isinstance(method, StagedMethod)]


@pytest.fixture(scope="module")
def calibrated():
    """A model and the thresholds of each method with several masks."""
    torch.manual_seed(0)
    model, batches = models.make_model(), [models.make_ids(4, 48, seed) for seed in range(2)]
    configs = {
        name: cats.calibrate(
            model, batches, method=name, target_bytes=0.6, attention=name == "cascade"
        )
        for name in STAGED
    }
    return model, batches, configs


@pytest.fixture
def dense(calibrated):
    model = models.make_model()
    model.load_state_dict(calibrated[0].state_dict())
    return model


def keep(x, threshold):
    return torch.where(x.abs() < threshold, 0, x)


@pytest.mark.parametrize("method", STAGED)
def test_masks_drop_what_the_formula_says(calibrated, dense, method):
    config = calibrated[2][method]
    x = torch.randn(2, 5, 16)
    mlp = find_gated_mlps(dense)[0]
    none = torch.zeros(())
    inputs = {part: config.inputs.get(f"{mlp.name}.{part}_proj", none) for part in ("gate", "up")}
    module = mlp.module
    a = F.silu(module.gate_proj(keep(x, inputs["gate"])))
    h = keep(a, config.thresholds[mlp.name]) * module.up_proj(keep(x, inputs["up"]))
    expected = module.down_proj(keep(h, config.inputs.get(f"{mlp.name}.down_proj", none)))
    cats.sparsify_(dense, config)
    torch.testing.assert_close(dense.get_submodule(mlp.name)(x), expected)
    assert not torch.equal(expected, calibrated[0].get_submodule(mlp.name)(x))


@pytest.mark.parametrize("method", STAGED)
def test_token_reads_the_share_that_was_asked_for(calibrated, dense, method):
    _, batches, configs = calibrated
    cats.sparsify_(dense, configs[method])
    read = read_shares(dense, batches)
    layers = dict(dense.named_modules())
    names = [n for n in layers if n.endswith("_proj") and (method == "cascade" or "mlp" in n)]
    sizes = {name: layers[name].weight.numel() for name in names}
    share = sum(size * read.get(name, 1.0) for name, size in sizes.items()) / sum(sizes.values())
    assert share == pytest.approx(0.6, abs=0.06)


@pytest.mark.parametrize("method", STAGED)
def test_saved_model_is_the_same_and_plain_transformers_loads_it_dense(
    calibrated, dense, method, tmp_path
):
    config, ids = calibrated[2][method], models.make_ids(seed=3)
    before = models.logits(dense, ids)
    expected = models.logits(cats.sparsify_(dense, config), ids)
    dense.save_pretrained(tmp_path / "model")
    config.save(tmp_path / "thresholds.safetensors")
    assert CatsConfig.load(tmp_path / "thresholds.safetensors") == config
    loaded = cats.from_pretrained(tmp_path / "model")
    assert torch.equal(models.logits(loaded, ids), expected)
    plain = type(dense).from_pretrained(tmp_path / "model")
    assert torch.equal(models.logits(plain, ids), before)
    assert torch.equal(models.logits(cats.densify_(dense), ids), before)
    assert not any(isinstance(m, InputMask) for m in dense.modules())


@pytest.mark.parametrize("method", [m for m in STAGED if m != "teal"])
def test_fused_mlps_compute_the_same(calibrated, dense, method):
    ids = models.make_ids(1, 6)
    expected = models.logits(cats.sparsify_(dense, calibrated[2][method]), ids)
    tokens = cats.generate(dense, ids, engine="eager", max_new_tokens=8, do_sample=False)
    cats.fuse_(dense)
    torch.testing.assert_close(models.logits(dense, ids), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read_shares(dense, [ids]), read_shares(cats.unfuse_(dense), [ids]))
    fused = cats.generate(cats.fuse_(dense), ids, engine="eager", max_new_tokens=8, do_sample=False)
    models.assert_same_tokens(dense, fused, tokens, tie=1e-3)


def test_mask_that_no_kernel_has_is_named(calibrated, dense):
    cats.sparsify_(dense, calibrated[2]["teal"])
    with pytest.raises(UnsupportedModelError, match="inputs of up"):
        cats.fuse_(dense)


def test_thresholds_keep_their_dtype_and_follow_the_device(calibrated, dense):
    config = calibrated[2]["cascade"]
    cats.sparsify_(dense, config).to(torch.bfloat16)
    gate = dense.model.layers[0].mlp.gate_proj
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.input_threshold, config.inputs["model.layers.0.mlp.gate_proj"])
    state = dense.state_dict()
    state["model.layers.0.mlp.gate_proj.input_threshold"] = torch.full((16,), 7.0)
    dense.load_state_dict(state)
    assert (gate.input_threshold == 7).all()


def test_record_of_another_method_is_refused(calibrated, dense):
    cascade, teal = (calibrated[2][name] for name in ("cascade", "teal"))
    before = dense.state_dict().keys()
    with pytest.raises(ConfigError, match=r"has no thresholds on the inputs of .*up_proj"):
        cats.sparsify_(dense, dataclasses.replace(teal, method="cascade"))
    with pytest.raises(ConfigError, match=r"needs thresholds on the inputs of .*up_proj"):
        cats.sparsify_(dense, dataclasses.replace(cascade, method="teal"))
    assert dense.state_dict().keys() == before


def test_threshold_of_another_shape_is_refused_and_nothing_changes(calibrated, dense):
    config, ids = calibrated[2]["two-stage"], models.make_ids()
    before = models.logits(dense, ids)
    last = [*config.inputs][-1]
    wrong = dataclasses.replace(config, inputs=config.inputs | {last: torch.rand(3)})
    with pytest.raises(ModelMismatchError, match=r"shape \[3\].*40 inputs"):
        cats.sparsify_(dense, wrong)
    assert torch.equal(models.logits(dense, ids), before)
    assert not any(isinstance(m, InputMask) for m in dense.modules())
    unknown = dataclasses.replace(config, inputs=config.inputs | {"model.nothing": torch.rand(3)})
    with pytest.raises(ModelMismatchError, match="no linear layer"):
        cats.sparsify_(dense, unknown)


def test_method_of_a_newer_release_is_refused_with_the_version(calibrated, dense, tmp_path):
    config = dataclasses.replace(calibrated[2]["neuron"], method="later", release="9.1")
    with pytest.raises(ConfigError, match=r"no method 'later'.*'cats-llm>=9\.1'"):
        cats.sparsify_(dense, config)


def test_missing_thresholds_of_inputs_are_refused(calibrated):
    config = calibrated[2]["cascade"]
    block = config.to_dict()
    assert block["version"] == 2
    some = dict([*config.inputs.items()][:-1])
    with pytest.raises(FormatError, match="expected"):
        CatsConfig.from_dict(block, config.tensors, inputs=some)


@pytest.mark.parametrize(
    ("family", "method"), [(Gemma2Config, "cascade"), (Phi3Config, "two-stage")]
)
def test_other_families_are_calibrated(family, method):
    model, ids = models.make_model(family), models.make_ids(2, 16)
    config = cats.calibrate(model, [ids], method=method, target_bytes=0.7)
    cats.fuse_(cats.sparsify_(model, config))
    assert models.logits(model, ids).isfinite().all()


def test_stacked_gate_and_up_cannot_drop_inputs_of_gate_alone():
    model, ids = models.make_model(Phi3Config), models.make_ids(2, 16)
    config = cats.calibrate(model, [ids], method="cascade", target_bytes=0.7)
    with pytest.raises(UnsupportedModelError, match="gate and up are one layer"):
        cats.sparsify_(model, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="cascade", target_sparsity=0.5), "needs target_bytes"),
        (dict(method="cascade"), "needs target_bytes"),
        (dict(method="cascade", target_bytes=0.01), "is the least"),
        (dict(method="cats", target_bytes=0.3), "gate is read whole"),
        (dict(method="cats", target_sparsity=0.5, attention=True), "leaves attention"),
        (dict(method="relu", target_bytes=0.5), "has no target"),
    ],
)
def test_target_that_cannot_be_met_is_refused(options, message):
    model = models.make_model(LlamaConfig)
    with pytest.raises(ConfigError, match=message):
        cats.calibrate(model, [models.make_ids(2, 16)], **options)


def test_cats_finds_its_sparsity_at_a_share_of_bytes():
    model, ids = models.make_model(), models.make_ids()
    config = cats.calibrate(model, [ids], target_bytes=2 / 3)
    assert config.target_sparsity == pytest.approx(0.5)


def test_fine_tuning_of_dropped_inputs_is_refused(calibrated, dense):
    from cats.finetuning import FinetuneOptions
    from cats.finetuning.checks import _check_sparsity

    cats.sparsify_(dense, calibrated[2]["two-stage"])
    with pytest.raises(UnsupportedModelError, match=r"down_proj drops inputs .*'two-stage'"):
        _check_sparsity(dense, FinetuneOptions(), None)
    cats.sparsify_(dense, calibrated[2]["neuron"])
    _check_sparsity(dense, FinetuneOptions(), None)


def test_rows_that_are_decoded_together_read_the_union(calibrated, dense):
    cats.sparsify_(dense, calibrated[2]["cascade"])
    ids = models.make_ids(4, 16)
    with ReadShares(dense, together=(1, 2, 4)) as reads:
        models.logits(dense, ids)
    kinds = [reads.by_kind(rows) for rows in (1, 2, 4)]
    assert kinds[0].keys() == {
        "inputs of attention",
        "inputs of gate",
        "rows of up",
        "columns of down",
    }
    for kind in kinds[0]:
        one, two, four = (share[kind] for share in kinds)
        assert one < two < four < 1
    gate, seen = dense.model.layers[0].mlp.gate_proj, []
    handle = gate.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    models.logits(dense, ids)
    handle.remove()
    union = (seen[0].unflatten(0, (2, 2)) != 0).any(1).float().mean()
    assert reads.shares(2)["model.layers.0.mlp.gate_proj"] == pytest.approx(float(union))
