"""Checkpoints for vLLM, and vLLM in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cats
from tests import models

TOKENS = 24
SIZES = dict(
    hidden_size=64,
    intermediate_size=160,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
)
ENVIRONMENT = os.environ | {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
PROMPTS = [[5, 6, 7, 8, 9], [100, 101, 55]]


def make_dense(config, **changes):
    """A model whose tokens do not repeat, and depend on its MLPs."""
    torch.manual_seed(0)
    model = models.make_model(config, **SIZES | changes)
    with torch.no_grad():
        # else the last token is the likeliest: Gemma enlarges embeddings, and uses them as its head
        std = 1 / 64 if "gemma" in model.config.model_type else 1.0
        model.get_input_embeddings().weight.normal_(std=std)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
    return model


def save(model, folder):
    model.save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)
    return folder


def tokens_of(model, prompts=PROMPTS):
    """What transformers generates."""
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    outputs = [model.generate(torch.tensor([ids]), **options)[0] for ids in prompts]
    return [ids[len(p) :].tolist() for p, ids in zip(prompts, outputs, strict=True)]


def make_sparse(model, **options):
    """Make the model sparse; returns its dense tokens."""
    dense = tokens_of(model)
    options = {"target_sparsity": 0.6} | options
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids(8, 64)], **options))
    return dense


def job(folder, *, prompts=PROMPTS, adapter=None, **options):
    return {
        "options": {"model": str(folder), **options},
        "prompts": prompts,
        "adapter": None if adapter is None else str(adapter),
    }


def run_vllm(jobs, **environment):
    """The answers of ``generate.py``, which runs the jobs one after the other."""
    script = Path(__file__).with_name("generate.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(jobs),
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout[-4000:], done.stderr[-8000:])
    assert done.returncode == 0
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    return json.loads(line.removeprefix("ANSWERS "))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")
