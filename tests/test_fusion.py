import copy
import io
from contextlib import nullcontext

import accelerate
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from transformers import LlamaConfig

import cats
from cats.errors import BackendError, ShapeError, UnsupportedModelError
from cats.functional import cats_activation
from cats.fusion import FusedGatedMLP, fused_mlps
from cats.model import CatsActivation
from cats.ops import backend_for, is_dense_batch, tracing_for_compiler
from cats.weights import mask_inputs_
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
        mask = torch.ones(2, 8, dtype=torch.long, device=device)
        options = dict(max_new_tokens=24, do_sample=False, cache_implementation=cache)
        return model.generate(ids[:2, :8], attention_mask=mask, **options)

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
        monkeypatch.setattr("cats.fusion.mlp.is_dense_batch", lambda x: len(x) > 2)
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


def _act(model, layer=0):
    return model.model.layers[layer].mlp.act_fn


@pytest.mark.parametrize("one_each", [False, True])
def test_loaded_thresholds_are_those_of_a_fused_model(one_each, device):
    source, ids = make_sparse(device=device)
    torch.manual_seed(0)
    fused = cats.fuse_(make_sparse(device=device)[0])
    for i in range(2):
        _act(source, i).threshold.fill_(0.4 + i)
        if one_each:
            _act(source, i).threshold = torch.rand(models.F, device=device)
    fused.load_state_dict(source.state_dict())
    torch.testing.assert_close(logits(fused, ids), logits(source, ids), rtol=1e-4, atol=1e-4)


def test_thresholds_of_a_fused_model_load_into_one_that_is_not(device):
    source, ids = make_sparse(device=device)
    torch.manual_seed(0)
    model = make_sparse(device=device)[0]
    _act(cats.fuse_(source)).threshold[::2] = 0.9
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(logits(model, ids), logits(source, ids), rtol=1e-4, atol=1e-4)


WRITES = {
    "fill_": lambda act: act.threshold.fill_(0.9),
    "copy_": lambda act: act.threshold.copy_(torch.tensor(0.9)),
    "data": lambda act: act.threshold.data.fill_(0.9),
    "new data": lambda act: setattr(act.threshold, "data", torch.full_like(act.threshold, 0.9)),
    "assigned": lambda act: setattr(act, "threshold", torch.full_like(act.threshold, 0.9)),
    "assigned number": lambda act: setattr(act, "threshold", act.threshold.new_tensor(0.9)),
}
JOURNEYS = {
    "as it is": lambda m: m,
    "deepcopy": copy.deepcopy,
    "half and back": lambda m: m.half().float(),
    "saved": lambda m: torch.load(_stored(m), weights_only=False),
    "fused again": lambda m: cats.fuse_(cats.unfuse_(m)),
}


def _stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("journey", JOURNEYS.values(), ids=JOURNEYS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_threshold_that_is_written_in_a_fused_model_is_used(write, journey, device):
    model, ids = make_sparse(device=device)
    model.half().float()  # so that a journey through half precision loses no bits
    before, fused = logits(model, ids), journey(cats.fuse_(copy.deepcopy(model)))
    logits(fused, ids)
    for changed in (model, fused):
        write(_act(changed))
    expected = logits(model, ids)
    assert not torch.allclose(expected, before, atol=1e-2)
    torch.testing.assert_close(logits(fused, ids), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(cats.unfuse_(fused), ids), expected)
    assert _act(fused).threshold.shape == _act(model).threshold.shape


def test_weights_replaced_in_a_fused_model_are_used_or_refused(device):
    model, ids = make_sparse(device=device)
    fused = cats.fuse_(copy.deepcopy(model))
    for m in (model, fused):
        torch.manual_seed(7)
        mlp = m.model.layers[0].mlp
        mlp.up_proj.weight = nn.Parameter(torch.randn(models.F, 16, device=device))
    expected = logits(model, ids)
    torch.testing.assert_close(logits(fused, ids), expected, rtol=1e-4, atol=1e-4)
    down = fused.model.layers[0].mlp.down_proj
    down.weight.data = down.weight.data.contiguous()
    for part in (ids, ids[:1, :1]):
        with pytest.raises(ShapeError, match="unfuse_"):
            logits(fused, part)
    cats.fuse_(cats.unfuse_(fused))
    torch.testing.assert_close(logits(fused, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_what_the_plain_modules_give(dtype, device):
    model, ids = make_sparse(device=device, dtype=dtype)
    fused = cats.fuse_(copy.deepcopy(model))
    seen = []
    fused.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with torch.autocast(device.type, torch.bfloat16):
        expected, actual = logits(model, ids), logits(fused, ids)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        x = torch.randn(1, 3, 16, device=device)
        outputs = [m.model.layers[0].mlp(x) for m in (model, fused)]
    assert [out.dtype for out in outputs] == [torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(actual, expected)
    assert seen == [1, 1]


def _failing_at(monkeypatch, call):
    """Lets the memory of one weight be refused: the so manieth that gets another layout."""
    calls = iter(range(1, 100))
    allocate = torch.empty_strided

    def empty_strided(*args, **kwargs):
        if next(calls) == call:
            raise torch.OutOfMemoryError("no memory")
        return allocate(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_strided", empty_strided)


def _state(model):
    modules = [*model.named_modules()]
    tensors = [
        (name, t, t.stride(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()
    ]
    return modules, tensors, getattr(model.config, "cats", None), model.training


def _assert_state(model, state):
    modules, tensors, block, training = state
    assert [*model.named_modules()] == modules
    now = model.state_dict(keep_vars=True)
    assert list(now) == [name for name, *_ in tensors]
    for name, tensor, stride, content in tensors:
        assert now[name] is tensor
        assert tensor.stride() == stride
        assert torch.equal(tensor, content)
    assert getattr(model.config, "cats", None) == block
    assert model.training == training


CHANGES = {
    "fuse_": (lambda m: m, cats.fuse_),
    "unfuse_": (cats.fuse_, cats.unfuse_),
    "densify_": (cats.fuse_, cats.densify_),
}


@pytest.mark.parametrize(("prepare", "change"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("call", [1, 2])
def test_change_without_memory_for_a_layer_leaves_the_model_as_it_was(
    prepare, change, call, device, monkeypatch
):
    model, ids = make_sparse(device=device)
    prepare(model)
    state, expected = _state(model), logits(model, ids)
    with monkeypatch.context() as patch:
        _failing_at(patch, call)
        with pytest.raises(torch.OutOfMemoryError):
            change(model)
    _assert_state(model, state)
    assert torch.equal(logits(model, ids), expected)
    change(model)


def test_layout_that_the_user_chose_comes_back(device):
    model, _ = make_sparse(device=device)
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    first.weight.data = first.weight.data.t().contiguous().t()
    second.weight.data = torch.empty(16, 2 * models.F, device=device)[:, : models.F].normal_()
    strides = first.weight.stride(), second.weight.stride()
    cats.unfuse_(cats.fuse_(model))
    assert (first.weight.stride(), second.weight.stride()) == strides


def test_weight_that_two_mlps_share_stays_shared(device):
    model, ids = make_sparse(device=device)
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    expected = logits(model, ids)
    cats.fuse_(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    cats.unfuse_(model)
    assert second.down_proj.weight is first.down_proj.weight
    assert first.down_proj.weight.is_contiguous()


def test_two_weights_in_the_same_memory_are_refused(device):
    model, _ = make_sparse(device=device)
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.weight.data = first.down_proj.weight.data
    with pytest.raises(UnsupportedModelError, match="same memory"):
        cats.fuse_(model)


def test_mlp_that_stands_at_two_places_is_fused_at_both(device):
    model, ids = make_sparse(device=device)
    first, second = model.model.layers
    second.mlp = mlp = first.mlp
    expected = logits(model, ids)
    cats.fuse_(model)
    assert isinstance(first.mlp, FusedGatedMLP)
    assert second.mlp is first.mlp
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    cats.unfuse_(model)
    assert second.mlp is first.mlp is mlp


def test_hooks_of_an_mlp_go_along_and_come_back(device):
    model, ids = make_sparse(device=device)
    mlp = model.model.layers[0].mlp
    seen = []
    handle = mlp.register_forward_hook(lambda m, args, out: seen.append(("plain", type(m))))
    cats.fuse_(model)
    fused = model.model.layers[0].mlp
    later = fused.register_forward_pre_hook(lambda m, args: seen.append(("later", type(m))))
    seen.clear()  # the probe has run the first
    logits(model, ids)
    assert seen == [("later", FusedGatedMLP), ("plain", FusedGatedMLP)]
    handle.remove()
    cats.unfuse_(model)
    seen.clear()
    logits(model, ids)
    assert seen == [("later", type(mlp))]
    later.remove()
    logits(model, ids)
    assert len(seen) == 1


@pytest.mark.parametrize("layer", ["gate_proj", "down_proj", "act_fn"])
def test_hook_on_a_layer_is_refused_before_and_after_fusing(layer, device):
    model, ids = make_sparse(device=device)
    handle = getattr(model.model.layers[1].mlp, layer).register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=f"{layer} has a hook"):
        cats.fuse_(model)
    handle.remove()
    cats.fuse_(model)
    getattr(model.model.layers[1].mlp, layer).register_forward_pre_hook(lambda *_: None)
    with pytest.raises(BackendError, match="hook"):
        logits(model, ids)


class NamedMLP(models.MLP):
    def forward(self, hidden_states, scale=1):
        return scale * super().forward(hidden_states)


def test_mlp_is_called_by_the_name_of_its_argument():
    model = nn.Sequential(NamedMLP())
    ids, x = models.make_ids(), torch.randn(2, 3, 16)
    body = models.Body(*model)
    cats.sparsify_(body, cats.calibrate(body, [ids], target_sparsity=0.5))
    expected = body.layers[0](hidden_states=x)
    fused = cats.fuse_(body).layers[0]
    with torch.no_grad():
        torch.testing.assert_close(fused(hidden_states=x), expected, rtol=1e-4, atol=1e-5)
        with cats.metrics.DroppedNeurons(body) as dropped:
            fused(hidden_states=x)
    assert 0 < dropped.shares()["layers.0"] < 1
    with pytest.raises(UnsupportedModelError, match="hidden_states alone"):
        fused(x, scale=2)


class DropoutMLP(models.MLP):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(super().forward(x))


def test_dropout_in_training_mode_is_refused():
    body = models.Body(DropoutMLP()).eval()
    cats.sparsify_(body, cats.calibrate(body, [models.make_ids()], target_sparsity=0.5))
    cats.fuse_(body.train())
    assert body.layers[0].dropout.training
    with torch.no_grad(), pytest.raises(BackendError, match="dropout"):
        body(models.make_ids())
    with torch.no_grad():
        body.eval()(models.make_ids())


def _own_tensor(mlp):
    mlp.register_buffer("scale", torch.ones(()))


UNFUSABLE = {
    "quantised": (lambda m: models.quantize_(m), "Int8Tensor"),
    "a tensor of its own": (lambda m: _own_tensor(m.model.layers[1].mlp), "scale"),
    "a weight norm": (
        lambda m: nn.utils.parametrizations.weight_norm(m.model.layers[1].mlp.up_proj),
        "up_proj is Parametrized",
    ),
    "pruned": (
        lambda m: prune.random_unstructured(m.model.layers[1].mlp.up_proj, "weight", 0.1),
        "pruning",
    ),
    "offloaded": (lambda m: accelerate.cpu_offload(m, torch.device("cpu")), "offloaded"),
}


@pytest.mark.parametrize(("change", "message"), UNFUSABLE.values(), ids=UNFUSABLE)
def test_what_one_operator_cannot_stand_for_is_refused_in_one_line(change, message):
    model, ids = make_sparse()
    change(model)
    expected = logits(model, ids)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        cats.fuse_(model)
    assert "\n" not in str(caught.value)
    assert not list(fused_mlps(model))
    assert torch.equal(logits(model, ids), expected)


def test_weights_that_are_offloaded_or_quantised_after_fusing_are_an_error():
    model, ids = make_sparse()
    accelerate.cpu_offload(cats.fuse_(model), torch.device("cpu"))
    with pytest.raises(ShapeError, match="offloaded"):
        logits(model, ids)
    model = models.quantize_(cats.fuse_(make_sparse()[0]))
    with pytest.raises((ShapeError, BackendError), match="quantised"):
        logits(model, ids)


def test_model_that_is_an_mlp_itself_is_refused():
    mlp = models.Body(models.MLP()).layers[0]
    mlp.act_fn = CatsActivation(mlp.act_fn, torch.tensor(0.1))
    with pytest.raises(UnsupportedModelError, match="itself"):
        cats.fuse_(mlp)


def test_model_that_is_fused_or_decoded_in_inference_mode_can_be_trained():
    model, ids = make_sparse()
    with torch.inference_mode():
        cats.fuse_(model)
        cats.generate(model, ids[:1, :4], max_new_tokens=3, eos_token_id=None)
        cats.release(model)
        cats.unfuse_(model)
    assert not any(p.is_inference() for p in model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()


def other_kind(mlp):
    mlp.act_fn.act = nn.ReLU()


def other_setting(mlp):
    mlp.act_fn.act.approximate = "tanh"


def hook_inside(mlp):
    mlp.act_fn.act.register_forward_hook(lambda m, args, out: 0 * out)


def forward_of_a_layer(mlp):
    mlp.up_proj.forward = lambda x: 0 * x


def forward_of_the_activation(mlp):
    mlp.act_fn.forward = lambda x: 0 * x


def other_router(mlp):
    mlp.act_fn.router = "up"


@pytest.mark.parametrize(
    "change",
    [
        other_kind,
        other_setting,
        hook_inside,
        forward_of_a_layer,
        forward_of_the_activation,
        other_router,
    ],
)
def test_change_inside_a_fused_mlp_is_an_error(change):
    model, ids = make_sparse()
    change(cats.fuse_(model).model.layers[0].mlp)
    with pytest.raises(BackendError, match="unfuse_"):
        logits(model, ids)


class TwoStageMLP(models.MLP):
    """Its own forward compares what its activation cannot see: up."""

    ignores_up = False

    def forward(self, x):
        a, u = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        if self.act_fn.router == "up" and not self.ignores_up:
            u = cats_activation(u, self.act_fn.threshold)
            a = torch.where(u == 0, 0, a)
        return self.down_proj(a * u)


def two_stage(router, product_threshold):
    mlp = TwoStageMLP()
    size = mlp.gate_proj.out_features
    threshold = torch.rand(size) / 2
    products = product_threshold * (1 + torch.rand(size))
    mlp.act_fn = CatsActivation(nn.SiLU(), threshold, router=router)
    mask_inputs_(mlp.down_proj, products)
    return nn.Sequential(mlp)


@pytest.mark.parametrize("router", ["gate", "up"])
def test_router_and_product_thresholds_of_a_method_reach_the_operator(router):
    model = two_stage(router, 0.05)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = model(x)
        _, mlp = next(fused_mlps(cats.fuse_(model)))
        assert (mlp.router, mlp.backend) == (router, "auto")
        torch.testing.assert_close(model(x), expected)
        # both thresholds are read at each call
        mlp.original.down_proj.input_threshold.fill_(torch.inf)
        assert not model(x).any()
        mlp.original.down_proj.input_threshold.zero_()
        mlp.original.act_fn.threshold.fill_(torch.inf)
        assert not model(x).any()
        assert not mlp.kept(x).any()


def test_mlp_that_drops_inputs_of_up_is_refused_by_name():
    model = two_stage("gate", 0.5)
    mask_inputs_(model[0].up_proj, torch.rand(16))
    with pytest.raises(UnsupportedModelError, match="inputs of up, which no kernel"):
        cats.fuse_(model)


@pytest.mark.parametrize("batch", [1, 3, 8, 40])
def test_inputs_of_gate_that_are_dropped_reach_the_operator(batch):
    model, x = two_stage("gate", 0.05), torch.randn(batch, 16)
    gate = mask_inputs_(model[0].gate_proj, torch.rand(16))
    with torch.no_grad():
        expected = model(x)
        _, mlp = next(fused_mlps(cats.fuse_(model)))
        assert gate.weight.stride() == (1, models.F)
        torch.testing.assert_close(model(x), expected)
        gate.input_threshold.fill_(torch.inf)
        assert not model(x).any()
        assert not mlp.kept(x).any()
    cats.unfuse_(model)
    assert gate.weight.is_contiguous()
