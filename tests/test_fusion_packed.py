"""Fused MLPs over quantised weights."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, LlamaConfig, Phi3Config, Qwen2Config

import cats
from cats import fingerprint
from cats.decode.stream.packed import pack_, unpack_
from cats.decode.stream.spec import read_spec
from cats.errors import BackendError, ShapeError, UnsupportedModelError
from cats.fusion import FusedGatedMLP, FusedPackedMLP, fused_mlps
from cats.model import CatsActivation
from cats.weights import QuantisedLinear, mask_inputs_
from tests import models
from tests.quantised import quantise_
from tests.test_fusion import TwoStageMLP

SIZES = dict(hidden_size=64, intermediate_size=160)


def make_sparse(config=LlamaConfig, kind="int4", *, dtype=torch.float32, only="", **changes):
    """A quantised model with thresholds, and ids."""
    options = dict(group_size=32) | changes
    model = models.make_model(config, **SIZES).to(dtype)
    quantise_(model, kind, only, **options)
    ids = models.make_ids(8, 32)
    return cats.sparsify_(model, cats.calibrate(model, [ids], target_sparsity=0.5)), ids


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, QuantisedLinear)]


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Gemma2Config, Phi3Config])
@pytest.mark.parametrize("kind", ["int4", "int8 rows", "int4 zeros", "int4 shifts"])
def test_fused_model_gives_the_logits_of_the_unfused_one(config, kind):
    model, ids = make_sparse(config, kind)
    expected, state = logits(model, ids), copy.deepcopy(model.state_dict())
    hashed = fingerprint.of_model(model)
    assert cats.fuse_(model) is model
    assert {type(m) for _, m in fused_mlps(model)} == {FusedPackedMLP}
    close(logits(model, ids), expected)
    # one token goes through the decode kernel, where there is one
    close(logits(model, ids[:1, :1]), expected[:1, :1])
    # names and values of what is saved stay, thresholds may have grown to one per neuron
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(t, found[n]) for n, t in state.items() if "threshold" not in n)
    assert fingerprint.of_model(model) == hashed
    assert not any(
        hasattr(layer, "codes") for _, mlp in fused_mlps(model) for layer in mlp.quantised_layers
    )
    cats.unfuse_(model)
    assert all(layer.layout is None for layer in layers_of(model))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model, ids), expected)


def test_only_the_mlps_are_packed_and_their_codes_are_stored_once():
    model, _ = make_sparse()
    cats.fuse_(model)
    packed = {n for n, m in model.named_modules() if getattr(m, "layout", None) and "proj" in n}
    assert packed == {
        f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up", "down")
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits_are_fused(dtype):
    model, ids = make_sparse(dtype=dtype)
    expected = logits(model, ids).float()
    found = logits(cats.fuse_(model), ids).float()
    assert (found - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_tokens_are_those_of_the_unfused_model(engine):
    model, _ = make_sparse()
    ids = models.make_ids(1, 8)
    options = dict(engine=engine, max_new_tokens=12, do_sample=False)
    expected = cats.generate(model, ids, **options)
    models.assert_same_tokens(model, cats.generate(cats.fuse_(model), ids, **options), expected)


def test_fused_model_compiles_as_one_graph():
    model, ids = make_sparse()
    cats.fuse_(model)
    expected = logits(model, ids[:1, :3])
    with torch.no_grad():
        options = dict(fullgraph=True, backend="aot_eager")
        compiled = torch.compile(lambda i: model(i, use_cache=False).logits, **options)
        close(compiled(ids[:1, :3]), expected)


@pytest.mark.parametrize("config", [LlamaConfig, Phi3Config])
def test_realized_sparsity_is_that_of_the_unfused_model(config):
    model, ids = make_sparse(config)
    expected = cats.metrics.realized_sparsity(model, [ids])
    assert cats.metrics.realized_sparsity(cats.fuse_(model), [ids]) == pytest.approx(expected)


def test_mlps_of_ordinary_weights_are_fused_beside_quantised_ones():
    model, ids = make_sparse(only="layers.0")
    expected = logits(model, ids)
    cats.fuse_(model)
    assert [type(m) for _, m in fused_mlps(model)] == [FusedPackedMLP, FusedGatedMLP]
    close(logits(model, ids), expected)
    assert not list(fused_mlps(cats.unfuse_(model)))


def test_thresholds_written_or_loaded_after_fusing_are_used():
    model, ids = make_sparse()
    fused = cats.fuse_(copy.deepcopy(model))
    for changed in (model, fused):
        changed.model.layers[0].mlp.act_fn.threshold.fill_(0.9)
    close(logits(fused, ids), logits(model, ids))
    other, _ = make_sparse()
    other.model.layers[1].mlp.act_fn.threshold.fill_(0.2)
    fused.load_state_dict(other.state_dict())
    close(logits(fused, ids), logits(other, ids))


def test_codes_loaded_into_a_fused_model_are_used():
    model, ids = make_sparse()
    before = logits(cats.fuse_(model), ids)
    state = model.state_dict()
    for name in state:
        if name.endswith("mlp.down_proj.codes"):
            state[name] = state[name] ^ 0x33
    model.load_state_dict(state)
    after = logits(model, ids)
    assert (after - before).norm() > 0.05 * before.norm()
    close(after, logits(cats.unfuse_(model), ids))


def test_codes_loaded_between_two_answers_are_used():
    model, _ = make_sparse()
    cats.fuse_(model)
    decoder, ids = cats.Decoder(model, engine="eager"), models.make_ids(1, 8)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    before = decoder.generate(ids, **options)
    state = {n: t ^ 0x77 if n.endswith("codes") else t for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    after = decoder.generate(ids, **options)
    assert not torch.equal(before, after)
    models.assert_same_tokens(model, after, cats.generate(cats.unfuse_(model), ids, **options))


def _stored(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("journey", [copy.deepcopy, _stored, lambda m: m.half().float()])
def test_a_fused_model_is_copied_and_stored(journey):
    model, ids = make_sparse()
    other = journey(cats.fuse_(model))
    torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=1e-2, atol=1e-2)
    assert {type(m) for _, m in fused_mlps(other)} == {FusedPackedMLP}
    assert all(layer.layout is None for layer in layers_of(cats.unfuse_(other)))


def test_sparsify_and_densify_unpack():
    model, ids = make_sparse()
    dense = cats.densify_(copy.deepcopy(model))
    config = cats.calibrate(dense, [ids], target_sparsity=0.3)
    for change in (lambda: cats.sparsify_(model, config), lambda: cats.densify_(model)):
        cats.fuse_(model)
        change()
        assert not list(fused_mlps(model))
        assert all(layer.layout is None for layer in layers_of(model))


def test_saved_fused_model_is_the_sparse_one(tmp_path):
    model, ids = make_sparse()
    expected = logits(model, ids)
    cats.fuse_(model)
    state = model.state_dict()
    other, _ = make_sparse()
    for layer in layers_of(other):
        layer.codes ^= 0x11
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other, ids), expected)


UNFUSABLE = {
    "act-order": (dict(kind="int4 ordered", only="mlp"), r"gate of it is .*another order"),
    "float8": (dict(kind="float8", only="mlp"), "gate of it is .*float8"),
    "groups of 8": (dict(group_size=8), "gate of it is .*groups of 8"),
    "a dense up": (dict(only="gate"), "expected all of them quantised, or none"),
    "another down": (dict(only="down"), "expected all of them quantised, or none"),
}


@pytest.mark.parametrize(("options", "message"), UNFUSABLE.values(), ids=UNFUSABLE)
def test_what_no_kernel_reads_is_refused_and_stays(options, message):
    model, ids = make_sparse(**options)
    expected, before = logits(model, ids), {n: id(b) for n, b in model.named_buffers()}
    with pytest.raises(UnsupportedModelError, match=f"mlp cannot be fused: .*{message}"):
        cats.fuse_(model)
    assert {n: id(b) for n, b in model.named_buffers()} == before
    assert torch.equal(logits(model, ids), expected)


def test_gate_and_up_of_two_layouts_are_refused():
    model, _ = make_sparse(kind="int8 rows", only="up_proj")
    quantise_(model, "int4", "mlp", group_size=32)
    with pytest.raises(UnsupportedModelError, match="gate and up of it are stored in two ways"):
        cats.fuse_(model)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_fusing_without_memory_for_a_layer_leaves_the_model_as_it_was(call, monkeypatch):
    model, ids = make_sparse()
    # packed by somebody else: it stays so
    model.model.layers[0].mlp.gate_proj.pack_rows_()
    expected, state = logits(model, ids), copy.deepcopy(model.state_dict())
    calls, function = [], QuantisedLinear._store

    def failing(self, weight):
        calls.append(weight)
        if len(calls) == call:
            raise torch.OutOfMemoryError
        function(self, weight)

    with monkeypatch.context() as patch:
        patch.setattr(QuantisedLinear, "_store", failing)
        with pytest.raises(torch.OutOfMemoryError):
            cats.fuse_(model)
    assert not list(fused_mlps(model))
    packed = [n for n, m in model.named_modules() if getattr(m, "layout", None)]
    assert packed == ["model.layers.0.mlp.gate_proj"]
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("change", [cats.unfuse_, cats.densify_])
def test_unfusing_without_memory_leaves_the_model_fused(change, call, monkeypatch):
    model, ids = make_sparse()
    expected, calls, function = logits(cats.fuse_(model), ids), [], QuantisedLinear._store

    def failing(self, weight):
        calls.append(weight)
        if len(calls) == call:
            raise torch.OutOfMemoryError
        function(self, weight)

    with monkeypatch.context() as patch:
        patch.setattr(QuantisedLinear, "_store", failing)
        with pytest.raises(torch.OutOfMemoryError):
            change(model)
    assert len(list(fused_mlps(model))) == 2
    assert torch.equal(logits(model, ids), expected)


def replaced(mlp):
    mlp.up_proj = nn.Linear(64, 160, bias=False)


def unpacked(mlp):
    mlp.gate_proj.unpack_()


def packed_otherwise(mlp):
    mlp.down_proj.pack_rows_()


def hooked(mlp):
    mlp.up_proj.register_forward_hook(lambda *_: None)


def other_forward(mlp):
    mlp.up_proj.forward = lambda x: x


def other_activation(mlp):
    mlp.act_fn.act = nn.ReLU()


@pytest.mark.parametrize(
    "change", [replaced, unpacked, packed_otherwise, hooked, other_forward, other_activation]
)
def test_a_change_inside_a_fused_mlp_is_an_error(change):
    model, ids = make_sparse()
    cats.fuse_(model)
    change(model.model.layers[0].mlp)
    with pytest.raises(BackendError, match="unfuse_"):
        logits(model, ids)


@pytest.mark.parametrize("layer", ["gate_proj", "down_proj"])
def test_hook_on_a_layer_is_refused_before_fusing(layer):
    model, _ = make_sparse()
    getattr(model.model.layers[1].mlp, layer).register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=f"{layer} has a hook"):
        cats.fuse_(model)


def test_training_and_another_dtype_are_errors():
    model, _ = make_sparse()
    cats.fuse_(model)
    with pytest.raises(BackendError, match="no gradient"):
        model(inputs_embeds=torch.randn(1, 3, 64, requires_grad=True)).logits.sum().backward()
    mlp = model.model.layers[0].mlp
    with torch.no_grad(), pytest.raises(ShapeError, match=r"computes in torch.float32, got"):
        mlp(torch.randn(1, 1, 64, dtype=torch.float64))


def test_autocast_gives_what_the_plain_modules_give():
    model, ids = make_sparse()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, ids)
        assert torch.equal(logits(cats.fuse_(model), ids), expected)


def test_a_backend_is_named_or_refused():
    model, ids = make_sparse()
    expected = logits(model, ids)
    close(logits(cats.fuse_(model, backend="reference"), ids), expected)
    cats.fuse_(cats.unfuse_(model), backend="cuda")
    with pytest.raises(BackendError, match="the backend cuda cannot run this call"):
        logits(model, ids)


@pytest.mark.parametrize("router", ["gate", "up"])
def test_router_and_product_thresholds_of_a_method_reach_the_operator(router):
    mlp, products = TwoStageMLP(size=64), 0.05 * (1 + torch.rand(models.F))
    threshold = torch.rand(models.F) / 2
    mlp.act_fn = CatsActivation(nn.SiLU(), threshold, router=router)
    model, x = quantise_(nn.Sequential(mlp), "int4", group_size=32), torch.randn(2, 3, 64)
    mask_inputs_(mlp.down_proj, products)
    with torch.no_grad():
        expected = model(x)
        _, fused = next(fused_mlps(cats.fuse_(model)))
        assert (type(fused), fused.router) == (FusedPackedMLP, router)
        torch.testing.assert_close(model(x), expected)
        # both thresholds are read at each call
        fused.original.down_proj.input_threshold.fill_(torch.inf)
        assert not model(x).any()
        fused.original.down_proj.input_threshold.zero_()
        fused.original.act_fn.threshold.fill_(torch.inf)
        assert not model(x).any()
        assert not fused.kept(x).any()


def test_the_stream_engine_and_fused_mlps_share_packed_layers():
    model, ids = make_sparse()
    expected, layers = logits(model, ids), []
    cats.fuse_(model)
    pack_(read_spec(model), layers)
    # what fuse_ has packed is not the engine's to unpack
    mlps = [layer for _, mlp in fused_mlps(model) for layer in mlp.quantised_layers]
    assert not {id(layer()) for layer in layers} & set(map(id, mlps))
    close(logits(model, ids), expected)
    unpack_(layers, ())
    assert [layer for layer in layers_of(model) if layer.layout] == mlps
    # the engine first, then the MLPs: those stay packed while they are fused
    cats.unfuse_(model)
    layers.clear()
    pack_(read_spec(model), layers)
    cats.fuse_(model)
    unpack_(layers, set(map(id, mlps)))
    assert [layer for layer in layers_of(model) if layer.layout] == mlps
    close(logits(model, ids), expected)
    cats.unfuse_(model)
    assert torch.equal(logits(model, ids), expected)


def test_model_that_is_fused_in_inference_mode_can_train_adapters_later():
    model, ids = make_sparse()
    with torch.inference_mode():
        cats.fuse_(model)
        cats.generate(model, ids[:1, :4], max_new_tokens=3, eos_token_id=None)
        cats.release(model)
        cats.unfuse_(model)
    assert not any(b.is_inference() for layer in layers_of(model) for b in layer.buffers())
    model(input_ids=ids, labels=ids).loss.backward()
