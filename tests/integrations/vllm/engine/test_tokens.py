"""vLLM generates the tokens of sparse transformers: ``make test-vllm`` runs these tests."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config

import cats
from tests import models
from tests.integrations.vllm.engine.conftest import (
    job,
    make_dense,
    make_sparse,
    run_vllm,
    save,
    tokens_of,
)

pytest.importorskip("vllm", reason="make test-vllm installs it in an environment of its own")

LLAMA = LlamaConfig.__name__


def changed(source, target, *, block=None, tensors=None):
    """A copy of a checkpoint with another ``cats`` block or other tensors."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if block is not None:
        config = json.loads((target / "config.json").read_text())
        config["cats"] |= block
        (target / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        stored = tensors(load_file(target / "model.safetensors"))
        save_file(stored, target / "model.safetensors", {"format": "pt"})
    return target


def without_first_threshold(stored):
    del stored["model.layers.0.mlp.act_fn.threshold"]
    return stored


def with_threshold_of_the_attention(stored):
    return stored | {"model.layers.0.self_attn.act_fn.threshold": torch.ones(())}


def with_two_thresholds(stored):
    return stored | {"model.layers.0.mlp.act_fn.threshold": torch.ones(2)}


@pytest.fixture(scope="module")
def checkpoints(folder):
    """Name of each sparse checkpoint to its folder, dense tokens and sparse tokens."""
    made = {}

    def add(name, model, **options):
        dense = make_sparse(model, **options)
        made[name] = save(model, folder / name), dense, tokens_of(model)

    for config in models.FAMILIES:
        add(config.__name__, make_dense(config))
    add("biases", make_dense(LlamaConfig, mlp_bias=True))
    add("relu", make_dense(LlamaConfig), method="relu", target_sparsity=None)
    add("first layer dense", make_dense(LlamaConfig), exclude=["model.layers.0.*"])
    model = make_dense(Qwen3Config)
    dense = make_sparse(model)
    for layer in model.model.layers:
        act = layer.mlp.act_fn
        act.widen_(160).mul_(2 * torch.rand(160))
    made["per neuron"] = save(model, folder / "per neuron"), dense, tokens_of(model)
    return made


@pytest.fixture(scope="module")
def answers(checkpoints, folder):
    """What one process of vLLM answers, by the name of the job."""
    jobs = {name: job(path) for name, (path, _, _) in checkpoints.items()}
    llama = checkpoints[LLAMA][0]
    jobs["transformers backend"] = job(llama, model_impl="transformers")
    model = cats.densify_(cats.from_pretrained(llama))
    jobs["dense"] = job(save(model, folder / "dense"))
    prefix = list(range(1, 41))
    jobs["many"] = job(
        llama, prompts=[prefix + [i] * (i % 7) for i in range(24)], block_size=32, max_num_seqs=6
    )
    for name, change in {
        "unknown method": {"block": {"method": "later"}},
        "newer format": {"block": {"version": 2}},
        "other router": {"block": {"router": "up"}},
        "missing": {"tensors": without_first_threshold},
        "of attention": {"tensors": with_threshold_of_the_attention},
        "wrong size": {"tensors": with_two_thresholds},
    }.items():
        jobs[name] = job(changed(llama, folder / name, **change))
    found = run_vllm([*jobs.values()], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return dict(zip(jobs, found, strict=True))


SPARSE = [config.__name__ for config in models.FAMILIES]
SPARSE += ["biases", "relu", "first layer dense", "per neuron"]


@pytest.mark.parametrize("name", SPARSE)
def test_tokens_are_those_of_sparse_transformers(checkpoints, answers, name):
    _, dense, sparse = checkpoints[name]
    assert answers[name].get("tokens") == sparse, answers[name]
    assert sparse != dense


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_mlps_run_as_one_operator(answers, name):
    fused = 1 if name == "first layer dense" else 2
    assert answers[name]["mlps"].get("FusedStackedMLP") == fused


def test_the_transformers_backend_of_vllm_is_sparse_too(checkpoints, answers):
    assert answers["transformers backend"]["tokens"] == checkpoints[LLAMA][2]


def test_dense_checkpoint_runs_in_the_class_of_vllm(checkpoints, answers):
    assert answers["dense"]["tokens"] == checkpoints[LLAMA][1]
    assert answers["dense"]["model"].startswith("vllm.")
    assert "FusedStackedMLP" not in answers["dense"]["mlps"]


def test_rows_that_come_and_go_share_the_prefix_cache(checkpoints, answers):
    model = cats.from_pretrained(checkpoints[LLAMA][0])
    prefix = list(range(1, 41))
    expected = tokens_of(model, [prefix + [i] * (i % 7) for i in range(24)])
    assert answers["many"].get("tokens") == expected, answers["many"]
    assert max(answers["many"]["cached"]) >= 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown method", "sparse by the method 'later'"),
        ("newer format", "format version 2"),
        ("other router", "compares 'up'"),
        ("missing", "thresholds of 1 MLPs are missing, such as model.layers.0.mlp"),
        ("of attention", "act_fn"),
        ("wrong size", "expected one number or 160"),
    ],
)
def test_what_would_be_another_model_is_refused(answers, name, message):
    assert message in answers[name].get("error", "")


def test_without_the_plugin_vllm_refuses_the_checkpoints(checkpoints):
    names = [config.__name__ for config in models.FAMILIES]
    jobs = [job(checkpoints[name][0]) for name in names]
    jobs.append(job(checkpoints[LLAMA][0], model_impl="transformers"))
    options = {"VLLM_PLUGINS": "none", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for answer in run_vllm(jobs, **options):
        assert "There is no module or parameter named" in answer.get("error", "")


def test_compiled_by_vllm(checkpoints):
    path, _, sparse = checkpoints[LLAMA]
    (answer,) = run_vllm([job(path, enforce_eager=False)], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert answer.get("tokens") == sparse, answer


def test_two_processes_share_each_mlp(checkpoints):
    names = [LLAMA, "biases", "per neuron"]
    jobs = [job(checkpoints[name][0], tensor_parallel_size=2) for name in names]
    for name, answer in zip(names, run_vllm(jobs), strict=True):
        assert answer.get("tokens") == checkpoints[name][2], answer


def test_adapter_runs_on_the_exact_path(checkpoints, folder):
    peft = pytest.importorskip("peft")
    path, _, without = checkpoints[LLAMA]
    model = cats.from_pretrained(path)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder / "adapter")
    expected = tokens_of(model)
    jobs = [
        job(path, enable_lora=True, adapter=folder / "adapter"),
        job(path, enable_lora=True),
    ]
    adapted, plain = run_vllm(jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert adapted["tokens"] == expected
    assert plain["tokens"] == without != expected
    assert "FusedStackedMLP" not in adapted["mlps"]
