import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig

import cats
from cats.errors import BackendError, UnsupportedModelError
from cats.fusion import FusedGatedMLP, fused_mlps
from cats.mlp import CatsActivation
from cats.ops import backend_for, is_dense_batch, tracing_for_compiler
from tests import models


def make_model(config=LlamaConfig, device="cpu", dtype=torch.float32, **changes):
    return models.make_model(config, **changes).to(device, dtype)


def make_sparse(config=LlamaConfig, device="cpu", dtype=torch.float32, **changes):
    model = make_model(config, device, dtype, **changes)
    ids = models.make_ids(8, 32).to(device)
    return cats.sparsify_(model, cats.calibrate(model, [ids], target_sparsity=0.5)), ids


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("config", models.FAMILIES, ids=lambda c: c.__name__)
def test_fused_model_gives_the_logits_of_the_unfused_one(config, device):
    model, ids = make_sparse(config, device)
    expected = logits(model, ids), logits(model, ids[:1, :1])
    cats.fuse_(model)
    torch.testing.assert_close(logits(model, ids), expected[0], rtol=1e-4, atol=1e-4)
    # one token goes through the decode kernel, where there is one
    torch.testing.assert_close(logits(model, ids[:1, :1]), expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", models.FAMILIES, ids=lambda c: c.__name__)
def test_unfuse_gives_back_modules_layout_and_bits(config, device):
    model, ids = make_sparse(config, device)
    expected, state = logits(model, ids), copy.deepcopy(model.state_dict())
    modules = [type(m) for m in model.modules()]
    cats.unfuse_(cats.fuse_(model))
    assert [type(m) for m in model.modules()] == modules
    assert all(p.is_contiguous() for p in model.parameters())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits(model, ids), expected)


def test_fusing_keeps_parameters_names_and_memory(device):
    model, _ = make_sparse(device=device)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    cats.fuse_(model)
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.t().is_contiguous()
    assert down.untyped_storage().nbytes() == down.numel() * down.element_size()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_tokens_of_the_unfused_model(cache, device):
    model, ids = make_sparse(device=device)

    def generate():
        return model.generate(
            ids[:2, :8], max_new_tokens=24, do_sample=False, cache_implementation=cache,
            attention_mask=torch.ones(2, 8, dtype=torch.long, device=device),
        )  # fmt: skip

    expected = generate()
    cats.fuse_(model)
    assert torch.equal(generate(), expected)


@pytest.mark.parametrize("tokens", [1, 8])
def test_fused_model_compiles_as_one_graph(tokens, device):
    model, ids = make_sparse(device=device)
    cats.fuse_(model)
    expected = logits(model, ids[:1, :tokens])
    with torch.no_grad():
        compiled = torch.compile(lambda i: model(i, use_cache=False).logits, fullgraph=True)
        torch.testing.assert_close(compiled(ids[:1, :tokens]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_batches_for_dense_gemms_are_compiled_in_the_open(tokens, compiles, device, monkeypatch):
    if device.type == "cpu":  # where the kernel takes every batch
        monkeypatch.setattr("cats.fusion.is_dense_batch", lambda x: len(x) > 2)
    model, _ = make_sparse(device=device)
    mlp = cats.fuse_(model).model.layers[0].mlp
    x = torch.randn(tokens, 1, mlp.original.hidden_size, device=device)
    with torch.no_grad(), tracing_for_compiler() if compiles else nullcontext():
        graph = make_fx(mlp, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), mlp(x), rtol=1e-4, atol=1e-5)
    is_hidden = any("gated_mlp" in str(node.target) for node in graph.graph.nodes)
    assert is_hidden == (tokens <= 2 or not compiles)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no such batch")
@pytest.mark.parametrize("tokens", range(1, 10))
def test_dense_batches_are_those_of_the_dispatch(tokens, device):
    mlp = cats.fuse_(make_sparse(device=device)[0]).model.layers[0].mlp
    x = torch.randn(tokens, mlp.original.hidden_size, device=device)
    assert is_dense_batch(x) == (backend_for(x, *mlp.operands()[:3]) == "dense")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_realized_sparsity_agrees_with_the_unfused_model(dtype, device):
    model, ids = make_sparse(device=device, dtype=dtype)
    unfused = cats.metrics.realized_sparsity(model, [ids])
    fused = cats.metrics.realized_sparsity(cats.fuse_(model), [ids])
    assert unfused.keys() == fused.keys()
    for name, share in unfused.items():
        assert share == pytest.approx(0.5, abs=0.02)
        assert fused[name] == pytest.approx(share, abs=0.002)


def test_relu_model_is_fused_with_relu(device):
    model = make_model(device=device)
    ids = models.make_ids(2, 16).to(device)
    cats.sparsify_(model, cats.calibrate(model, [ids], method="relu"))
    expected = logits(model, ids[:1, :1])
    cats.fuse_(model)
    assert [m.activation for _, m in fused_mlps(model)] == ["relu", "relu"]
    torch.testing.assert_close(logits(model, ids[:1, :1]), expected, rtol=1e-4, atol=1e-4)


def test_biases_and_per_neuron_thresholds_are_fused(device):
    model, ids = make_sparse(device=device, mlp_bias=True)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
        if isinstance(module, CatsActivation):
            module.threshold = torch.rand(models.F, device=device)
    expected = logits(model, ids[:1, :1])
    cats.fuse_(model)
    torch.testing.assert_close(logits(model, ids[:1, :1]), expected, rtol=1e-4, atol=1e-4)


def test_thresholds_stay_float32_when_the_fused_model_changes_dtype(device):
    model, ids = make_sparse(device=device)
    cats.fuse_(model)
    before = [m.thresholds.clone() for _, m in fused_mlps(model)]
    model.to(torch.bfloat16)
    after = [m.thresholds for _, m in fused_mlps(model)]
    assert all(t.dtype == torch.float32 for t in after)
    assert all(map(torch.equal, before, after))
    assert logits(model, ids[:1, :1]).isfinite().all()


def test_saved_fused_model_loads_as_the_sparse_one(device, tmp_path):
    model, ids = make_sparse(device=device)
    expected = logits(model, ids)
    cats.fuse_(model).save_pretrained(tmp_path)
    assert torch.equal(logits(cats.from_pretrained(tmp_path).to(device), ids), expected)


def test_sparsify_and_densify_take_the_fusion_apart(device):
    model, ids = make_sparse(device=device)
    config = cats.calibrate(cats.densify_(model), [ids], target_sparsity=0.7)
    dense = logits(model, ids)
    cats.fuse_(cats.sparsify_(model, config))
    cats.sparsify_(model, config)
    assert not list(fused_mlps(model))
    cats.fuse_(model)
    assert torch.equal(logits(cats.densify_(model), ids), dense)


def test_fusing_twice_changes_nothing(device):
    model, _ = make_sparse(device=device)
    cats.fuse_(model)
    mlps = dict(fused_mlps(model))
    assert dict(fused_mlps(cats.fuse_(model))) == mlps


def test_dense_model_is_refused(device):
    with pytest.raises(UnsupportedModelError, match="sparsify_"):
        cats.fuse_(make_model(device=device))


def test_mlp_with_another_formula_is_refused_and_left_as_it_was(device):
    model, ids = make_sparse(device=device)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (mlp.up_proj(x) + 1))
    expected = logits(model, ids)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp"):
        cats.fuse_(model)
    assert not list(fused_mlps(model))
    assert torch.equal(logits(model, ids), expected)


def test_adapter_added_after_fusing_is_an_error_and_unfusing_keeps_it(device):
    model, ids = make_sparse(device=device)
    expected = logits(model, ids)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    cats.fuse_(model)
    adapted = Doubled(16, models.F, bias=False, device=device)
    model.model.layers[0].mlp.gate_proj = adapted
    with pytest.raises(BackendError, match="unfuse_"):
        logits(model, ids)
    cats.unfuse_(model)
    assert model.model.layers[0].mlp.gate_proj is adapted
    assert not torch.equal(logits(model, ids), expected)


def test_training_a_fused_model_is_an_error(device):
    model, ids = make_sparse(device=device)
    cats.fuse_(model)
    with pytest.raises(BackendError, match="unfuse_"):
        model(ids, labels=ids).loss.backward()


def test_unknown_or_dead_backend_is_an_error(device):
    model, ids = make_sparse(device=device)
    with pytest.raises(BackendError, match="one of"):
        cats.fuse_(model, backend="fast")
    dead = [name for name, state in cats.ops.backends().items() if state != "live"]
    if not dead:
        pytest.skip("every backend is live on this machine")
    cats.fuse_(model, backend=dead[0])
    with pytest.raises(BackendError, match=dead[0]):
        logits(model, ids[:1, :1])


def test_fused_mlp_names_its_backend():
    model, _ = make_sparse()
    cats.fuse_(model, backend="reference")
    assert isinstance(model.model.layers[0].mlp, FusedGatedMLP)
    assert "backend=reference" in repr(model)
