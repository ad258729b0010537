import copy
import io

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig, MixtralConfig

import cats
from cats.benchmarks.decode_bytes import bytes_of_rows
from cats.errors import ConfigError, DataError, ModelMismatchError, UnsupportedModelError
from cats.evaluation.inputs import InputCounts
from cats.evaluation.traffic import mean_share, mlp_shares
from cats.model import GatedExperts, find_gated_mlps, is_sparse
from cats.model.traffic import share_of_layers, sparsity_at, token_bytes, weight_bytes
from tests import models

E = 4
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def make_mixture(config=MixtralConfig, **changes):
    torch.manual_seed(0)
    model = models.make_model(config, num_local_experts=E, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.25)
    return model


def experts_of(model):
    return [layer.mlp.experts for layer in model.model.layers]


def expected_logits(model, ids, thresholds):
    """Those of the dense model, whose experts are written out with thresholds ``[E]``."""

    def forward(experts, threshold):
        def run(x, index, shares):
            y = torch.zeros_like(x)
            for token in range(len(x)):
                for number, share in zip(index[token], shares[token], strict=True):
                    gate, up = (experts.gate_up_proj[number] @ x[token]).chunk(2)
                    a = nn.functional.silu(gate)
                    a = torch.where(a.abs() >= threshold[number], a, 0.0)
                    y[token] += share * (experts.down_proj[number] @ (a * up))
            return y

        return run

    plain = copy.deepcopy(model)
    for experts, threshold in zip(experts_of(plain), thresholds, strict=True):
        experts.forward = forward(experts, threshold)
    return models.logits(plain, ids)


@pytest.fixture(scope="module")
def mixture():
    return make_mixture()


def _calibrate(model, **options):
    return cats.calibrate(model, [models.make_ids(8, 64)], target_sparsity=0.5, **options)


@pytest.mark.parametrize("per_expert", [False, True])
def test_sparse_experts_compute_the_formula_in_every_implementation(mixture, per_expert):
    config = _calibrate(mixture, per_expert=per_expert)
    thresholds = [t.flatten().expand(E) for t in config.thresholds.values()]
    assert {t.shape for t in config.thresholds.values()} == {(E, 1) if per_expert else ()}
    ids = models.make_ids(2, 9, seed=1)
    expected = expected_logits(mixture, ids, thresholds)
    sparse = cats.sparsify_(copy.deepcopy(mixture), config)
    assert not torch.allclose(expected, models.logits(mixture, ids), atol=0.1)
    for name in IMPLEMENTATIONS:
        sparse.set_experts_implementation(name)
        torch.testing.assert_close(models.logits(sparse, ids), expected, rtol=1e-4, atol=1e-4)


def test_thresholds_that_differ_apply_to_their_own_expert(mixture):
    config = _calibrate(mixture, per_expert=True)
    for number, tensors in enumerate(config.tensors.values()):
        tensors["threshold"][:, 0] = torch.tensor([0.0, 1e9, 0.3, 0.1]).roll(number)
    ids = models.make_ids(3, 7, seed=2)
    expected = expected_logits(mixture, ids, [t[:, 0] for t in config.thresholds.values()])
    sparse = cats.sparsify_(copy.deepcopy(mixture), config)
    for name in IMPLEMENTATIONS:
        sparse.set_experts_implementation(name)
        torch.testing.assert_close(models.logits(sparse, ids), expected, rtol=1e-4, atol=1e-4)


def test_implementation_that_ignores_the_activation_is_refused(mixture):
    sparse = cats.sparsify_(copy.deepcopy(mixture), _calibrate(mixture))
    sparse.config._experts_implementation = "sonicmoe"
    with pytest.raises(UnsupportedModelError, match=r"'sonicmoe'.*grouped_mm"):
        models.logits(sparse, models.make_ids())
    dense = copy.deepcopy(mixture)
    dense.config._experts_implementation = "sonicmoe"
    with pytest.raises(UnsupportedModelError, match=r"'sonicmoe'.*grouped_mm"):
        find_gated_mlps(dense)


def test_experts_without_an_activation_module_are_refused_unless_they_are_left_out():
    sizes = models.SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts.*no activation"):
        find_gated_mlps(model)


def test_experts_whose_rows_come_in_an_unknown_order_are_refused(mixture):
    model = copy.deepcopy(mixture)
    experts = model.model.layers[1].mlp.experts

    class Reversed(type(experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            turned = super().forward(hidden_states.flip(0), top_k_index.flip(0), top_k_weights)
            return turned.flip(0)

    experts.__class__ = Reversed
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts.*other rows"):
        find_gated_mlps(model)


def test_a_copy_and_a_pickle_are_sparse_and_the_dense_model_comes_back(mixture):
    model, ids = copy.deepcopy(mixture), models.make_ids()
    before, structure = models.logits(model, ids), repr(model)
    cats.sparsify_(model, _calibrate(mixture, per_expert=True))
    expected = models.logits(model, ids)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(models.logits(twin, ids), expected)
        assert isinstance(experts_of(twin)[0], type(experts_of(mixture)[0]))
    cats.densify_(model)
    assert torch.equal(models.logits(model, ids), before)
    assert repr(model) == structure
    assert type(experts_of(model)[0]) is type(experts_of(mixture)[0])


def test_sparse_experts_are_found_and_made_sparse_again(mixture):
    model = cats.sparsify_(copy.deepcopy(mixture), _calibrate(mixture))
    first, _ = find_gated_mlps(model)
    assert isinstance(first, GatedExperts)
    assert (first.hidden_size, first.intermediate_size, first.experts) == (16, models.F, E)
    config = _calibrate(mixture, per_expert=True)
    cats.sparsify_(model, config)
    assert experts_of(model)[0].act_fn.threshold.shape == (E, 1)


def test_thresholds_of_another_number_of_experts_are_refused(mixture):
    model = copy.deepcopy(mixture)
    config = _calibrate(mixture, per_expert=True)
    for tensors in config.tensors.values():
        tensors["threshold"] = tensors["threshold"][1:]
    with pytest.raises(ModelMismatchError, match=r"\[3, 1\] for 4 experts"):
        cats.sparsify_(model, config)
    assert not is_sparse(model)
    assert type(experts_of(model)[0]) is type(experts_of(mixture)[0])


def test_saved_thresholds_of_experts_are_loaded(mixture, tmp_path):
    sparse = cats.sparsify_(copy.deepcopy(mixture), _calibrate(mixture, per_expert=True))
    sparse.save_pretrained(tmp_path)
    loaded = cats.from_pretrained(tmp_path)
    ids = models.make_ids()
    assert torch.equal(models.logits(loaded, ids), models.logits(sparse, ids))


def test_calibration_counts_the_tokens_that_an_expert_got(mixture):
    ids = models.make_ids(4, 16)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    seen = []
    gate = mixture.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda m, args, out: seen.append(out[2]))
    batch = {"input_ids": ids, "attention_mask": mask}
    try:
        statistics = cats.collect(mixture, [batch], per_expert=True)
    finally:
        handle.remove()
    chosen = seen[0][mask.flatten().bool()]
    expected = torch.bincount(chosen.flatten(), minlength=E)
    assert torch.equal(statistics.expert_tokens["model.layers.0.mlp.experts"], expected)
    counts = statistics.expert_counts["model.layers.0.mlp.experts"].sum(1)
    assert torch.equal(counts, expected * models.F)


def test_an_expert_that_no_token_reached_has_no_threshold_of_its_own():
    model = make_mixture()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate.weight[2:] = layer.mlp.gate.weight[:2]
            layer.mlp.gate.weight[1] += layer.mlp.gate.weight[0] * 3
    few = cats.collect(model, [models.make_ids(1, 2)], per_expert=True)
    name, tokens = next(iter(few.expert_tokens.items()))
    assert (tokens == 0).any()
    assert name in few.rare_experts()
    with pytest.raises(DataError, match=r"experts, such as number \d, got none of the 2 tokens"):
        few.config(0.5)
    # with one threshold for all, every expert has it
    shared = cats.collect(model, [models.make_ids(1, 2)]).config(0.5)
    cats.sparsify_(model, shared)
    assert is_sparse(model)


def test_experts_of_few_tokens_are_named(mixture):
    with pytest.warns(UserWarning, match=r"experts .* got fewer than 32 of the 40 tokens"):
        cats.calibrate(mixture, [models.make_ids(2, 20)], target_sparsity=0.5, per_expert=True)


def test_statistics_of_experts_add_up_and_are_saved(mixture, tmp_path):
    parts = [models.make_ids(4, 32, seed=seed) for seed in (0, 1)]
    whole = cats.collect(mixture, parts, per_expert=True)
    first, second = (cats.collect(mixture, [part], per_expert=True) for part in parts)
    (first + second).save(tmp_path / "statistics.safetensors")
    loaded = cats.Statistics.load(tmp_path / "statistics.safetensors")
    assert loaded.config(0.5) == whole.config(0.5)
    with pytest.raises(ModelMismatchError, match="per_expert"):
        first + cats.collect(mixture, [parts[1]])


def test_realised_sparsity_of_experts_counts_routed_tokens(mixture):
    ids = models.make_ids(4, 32)
    sparse = cats.sparsify_(copy.deepcopy(mixture), _calibrate(mixture))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    shares = cats.metrics.realized_sparsity(sparse, [dict(input_ids=ids, attention_mask=mask)])
    assert all(0.4 < share < 0.6 for share in shares.values())


def test_experts_that_run_on_all_tokens_are_counted_where_they_are_chosen():
    model = make_mixture(Llama4TextConfig, intermediate_size_mlp=models.F, num_experts_per_tok=1)
    ids = models.make_ids(4, 32)
    statistics = cats.collect(model, [ids])
    tokens = statistics.expert_tokens["model.layers.0.feed_forward.experts"]
    assert int(tokens.sum()) == ids.numel()
    sparse = cats.sparsify_(model, statistics.config(0.5))
    shares = cats.metrics.realized_sparsity(sparse, [ids])
    assert all(0.45 < share < 0.55 for share in shares.values())


def test_a_token_reads_the_experts_that_it_is_routed_to(mixture):
    experts = find_gated_mlps(mixture)
    of_experts = sum(mlp.bytes for mlp in experts)
    embedding = mixture.model.embed_tokens.weight.nbytes
    other = weight_bytes(mixture) - of_experts - embedding
    assert token_bytes(mixture) == other + of_experts / 2  # 2 of 4
    half = token_bytes(mixture, {mlp.name: 0.5 for mlp in experts})
    assert half == pytest.approx(other + of_experts / 2 / 2)


def test_of_its_experts_a_token_reads_gate_and_what_is_kept(mixture):
    ids = models.make_ids(4, 32)
    config = _calibrate(mixture)
    sparse = cats.sparsify_(copy.deepcopy(mixture), config)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    batch = dict(input_ids=ids, attention_mask=mask)
    dropped = cats.metrics.realized_sparsity(sparse, [batch])
    read = cats.metrics.read_shares(sparse, [batch])
    assert read == pytest.approx({n: 1 - share * 2 / 3 for n, share in dropped.items()})
    _, again, both = cats.metrics.perplexity_and_shares(sparse, [batch])
    assert (again, both) == (dropped, read)
    assert share_of_layers(sparse, read) == pytest.approx(sum(read.values()) / len(read))
    assert mean_share(sparse, mlp_shares(sparse, read)) == share_of_layers(sparse, read)
    assert sparsity_at(sparse, 2 / 3) == pytest.approx(0.5)


def test_methods_with_several_masks_refuse_experts(mixture):
    batches = [models.make_ids(2, 8)]
    with pytest.raises(UnsupportedModelError, match="stacked experts have no linear layers"):
        cats.calibrate(mixture, batches, target_bytes=0.5, method="cascade")
    with pytest.raises(ConfigError, match="per expert"):
        cats.calibrate(mixture, batches, target_bytes=0.5, method="cascade", per_expert=True)
    with pytest.raises(UnsupportedModelError, match="stacked experts have no linear layers"):
        InputCounts.collect(mixture, batches)
    sparse = cats.sparsify_(copy.deepcopy(mixture), _calibrate(mixture))
    with pytest.raises(UnsupportedModelError, match="several rows"):
        bytes_of_rows(sparse, [models.make_ids(1, 8)[0]], 2)
