import copy
import itertools

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, OPTConfig

import cats
from cats.errors import ConfigError, ShapeError, UnsupportedModelError
from cats.model import CatsActivation, activation_kind, find_gated_mlps
from tests import models

KINDS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("config", models.FAMILIES, ids=lambda c: c.__name__)
def test_every_layer_of_every_family_is_found(config):
    mlps = find_gated_mlps(models.make_model(config))
    assert [mlp.name for mlp in mlps] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    kind = "gelu_tanh" if "Gemma" in config.__name__ else "silu"
    assert {mlp.activation for mlp in mlps} == {kind}
    assert {(mlp.hidden_size, mlp.intermediate_size) for mlp in mlps} == {(16, models.F)}


@pytest.mark.parametrize("config", models.FAMILIES, ids=lambda c: c.__name__)
def test_model_on_meta_is_probed_with_random_weights(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**models.SIZES))
    assert len(find_gated_mlps(model)) == 2
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_model_of_any_dtype_is_found(dtype):
    assert len(find_gated_mlps(models.make_model().to(dtype))) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_gates_of_every_activation_are_found_with_and_without_bias(kind, bias):
    (mlp,) = find_gated_mlps(models.Body(models.MLP(KINDS[kind], bias=bias)))
    assert (mlp.name, mlp.activation) == ("layers.0", kind)


def test_mlp_that_clamps_is_found():
    assert len(find_gated_mlps(models.Body(models.ClampedMLP()))) == 1


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (models.TwiceMLP(), "its activation runs 2 times"),
        (models.AdditiveMLP(), "its output depends on the input even where"),
        (models.ShiftedAtLargeInputsMLP(), "its output depends on the input even where"),
        (models.MLP(models.UnknownActivation()), "its activation UnknownActivation is none of"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_module_of_another_form_is_refused_with_its_name_and_the_reason(mlp, reason):
    with pytest.raises(UnsupportedModelError) as caught:
        find_gated_mlps(models.Body(models.MLP(), mlp))
    message = str(caught.value)
    assert "layers.1" in message
    assert type(mlp).__name__ in message
    assert reason in message


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
            word_embed_proj_dim=16,
        ),
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64),
    ],
    ids=["OPT", "GPT2"],
)  # fmt: skip
def test_model_without_a_gate_is_refused(config):
    with pytest.raises(UnsupportedModelError, match="no gated MLP"):
        find_gated_mlps(AutoModelForCausalLM.from_config(config))


def test_stacked_experts_are_refused_by_name():
    config = MixtralConfig(**models.SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1})
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts.*stacked"):
        find_gated_mlps(AutoModelForCausalLM.from_config(config))


def test_activation_shared_by_two_mlps_is_refused():
    act = nn.SiLU()
    model = models.Body(models.MLP(act), models.MLP(act))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1.*shares.*layers\.0"):
        find_gated_mlps(model)


def test_excluded_modules_are_left_out():
    model = models.make_model()
    names = [mlp.name for mlp in find_gated_mlps(model, exclude=["*layers.0*"])]
    assert names == ["model.layers.1.mlp"]
    # one that would be refused may be excluded
    body = models.Body(models.MLP(), models.TwiceMLP())
    assert [mlp.name for mlp in find_gated_mlps(body, exclude=["layers.1"])] == ["layers.0"]


def test_one_pattern_may_be_given_without_a_list():
    names = [m.name for m in find_gated_mlps(models.make_model(), exclude="model.layers.0.mlp")]
    assert names == ["model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [("*.0.mpl", r"'\*\.0\.mpl' matches no MLP .* like 'model.layers.0.mlp'"),
     (["*.0.*", "*.1.*"], r"\*\.0\.\* \*\.1\.\* leaves no MLP")],
)  # fmt: skip
def test_patterns_that_match_nothing_or_everything_are_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        find_gated_mlps(models.make_model(), exclude=patterns)


@pytest.mark.parametrize("refused", [False, True])
def test_probe_changes_neither_modes_nor_random_state_nor_hooks(refused):
    mlp = models.TwiceMLP() if refused else models.MLP()
    mlp.dropout = nn.Dropout(0.5)
    mlp.act_fn.eval()
    model = models.Body(models.MLP(), mlp).train()
    mlp.up_proj.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    if refused:
        with pytest.raises(UnsupportedModelError):
            find_gated_mlps(model)
    else:
        find_gated_mlps(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], w) for name, w in weights.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_random_activation_does_not_change_the_random_state():
    model = models.Body(models.MLP(), models.MLP(nn.RReLU()))
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match="RReLU"):
        find_gated_mlps(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_is_recognised_by_its_values(kind):
    assert activation_kind(KINDS[kind]) == kind


@pytest.mark.parametrize("module", [nn.Identity(), nn.Dropout(), nn.Linear(4, 4), nn.Sequential()])
def test_other_modules_are_no_activations(module):
    assert activation_kind(module) is None


def test_fingerprint_is_the_same_in_another_dtype_and_differs_for_other_weights():
    (mlp, other) = find_gated_mlps(models.make_model())
    here = mlp.fingerprint()
    largest = here.abs().max()
    half = copy.deepcopy(mlp.module).bfloat16()
    (low,) = find_gated_mlps(models.Body(half))
    assert (low.fingerprint() - here).abs().max() < 0.01 * largest
    assert (other.fingerprint() - here).abs().max() > 0.1 * largest


CONVERSIONS = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "cpu": lambda m: m.to("cpu", torch.float16),
    "deepcopy": lambda m: copy.deepcopy(m).bfloat16(),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("threshold", [torch.tensor(0.1234567), torch.rand(models.F)])
def test_threshold_stays_exact_in_float32(convert, threshold):
    act = convert(nn.Sequential(CatsActivation(nn.SiLU(), threshold)))[0]
    assert act.threshold.dtype == torch.float32
    assert torch.equal(act.threshold, threshold)
    assert act._buffers["threshold"] is act.threshold


@pytest.mark.parametrize("assign", [False, True])
def test_threshold_survives_meta_and_a_state_dict(assign):
    model = models.make_model()
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    expected = models.logits(model, models.make_ids(seed=1))
    twin = copy.deepcopy(model).to("meta")
    assert twin.model.layers[0].mlp.act_fn.threshold.is_meta
    if not assign:
        twin.to_empty(device="cpu")
    twin.load_state_dict(state, assign=assign)
    threshold = twin.model.layers[0].mlp.act_fn.threshold
    assert threshold.dtype == torch.float32
    assert torch.equal(threshold, model.model.layers[0].mlp.act_fn.threshold)
    twin.model.rotary_emb = model.model.rotary_emb  # its buffers are not in the state dict
    assert torch.equal(models.logits(twin, models.make_ids(seed=1)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_activation_and_comparison_happen_in_float32(kind, dtype):
    act = CatsActivation(KINDS[kind], torch.tensor(0.2))
    x = torch.randn(5000).to(dtype)
    y = act(x)
    wide = KINDS[kind](x if dtype == torch.float64 else x.float())
    expected = torch.where(wide.abs() < 0.2000000029802322, 0, wide).to(dtype)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert (y == 0).any()
    assert (y != 0).any()


def test_activation_shows_its_threshold():
    assert "0.25" in repr(CatsActivation(nn.SiLU(), torch.tensor(0.25)))
    assert "[3]" in repr(CatsActivation(nn.SiLU(), torch.rand(3)))
    assert "[]" in repr(CatsActivation(nn.SiLU(), torch.tensor(0.25)).to("meta"))


class IntegerLinear(nn.Module):
    """A quantised layer of a library that keeps its weight as int8 numbers."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        values = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


@pytest.mark.parametrize("kind", ["integers", "a tensor class"])
def test_quantised_mlp_is_found_and_has_a_fingerprint(kind):
    model = models.make_model()
    plain = find_gated_mlps(model)
    if kind == "integers":
        for mlp in plain:
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(mlp.module, name, IntegerLinear(getattr(mlp.module, name)))
    else:
        models.quantize_(model)
    found = find_gated_mlps(model)
    assert [m.name for m in found] == [m.name for m in plain]
    first, second = (mlp.fingerprint() for mlp in found)
    assert first.isfinite().all()
    assert not torch.allclose(first, second)
    cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)


def test_weight_whose_values_cannot_be_read_is_named():
    class Opaque(models.Int8Tensor):
        dequantize = torch.Tensor.dequantize

    model = models.quantize_(models.make_model())
    (mlp, *_) = find_gated_mlps(model)
    weight = mlp.module.up_proj.weight
    mlp.module.up_proj.weight = nn.Parameter(Opaque(weight.values, weight.scale), False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj\.weight.*Opaque"):
        mlp.fingerprint()


def test_offloaded_mlp_has_the_fingerprint_of_its_weights():
    model = models.make_model()
    expected = [mlp.fingerprint() for mlp in find_gated_mlps(model)]
    accelerate.cpu_offload(model, torch.device("cpu"))
    found = find_gated_mlps(model)
    assert next(found[0].module.parameters()).is_meta
    assert all(map(torch.equal, expected, [mlp.fingerprint() for mlp in found]))
    assert next(found[0].module.parameters()).is_meta


def test_number_and_vector_thresholds_load_into_each_other():
    number, vector = torch.tensor(0.25), torch.rand(5)
    for own, loaded in itertools.product((number, vector), repeat=2):
        for assign in (False, True):
            act = CatsActivation(nn.SiLU(), own)
            act.load_state_dict({"threshold": loaded.to(torch.float64)}, assign=assign)
            assert torch.equal(act.threshold.expand(5), loaded.expand(5))
            assert act.threshold.dtype == torch.float32
    with pytest.raises(RuntimeError, match="size mismatch"):
        CatsActivation(nn.SiLU(), vector).load_state_dict({"threshold": torch.rand(4)})


def test_threshold_for_another_number_of_neurons_is_an_error():
    with pytest.raises(ShapeError, match="one for each neuron"):
        CatsActivation(nn.SiLU(), torch.rand(3)).widen_(4)
