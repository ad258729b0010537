"""Two processes train as one does: DDP and FSDP with gloo, on the CPU."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from cats.finetuning import load_adapter
from cats.history import History
from tests import models

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
SCRIPT = "from cats.cli import main\nmain()\n"
# accelerate shards on accelerators only; torch does on a CPU as well
SHARDED = (
    """
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or vars(self).get("fsdp_plugin")
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


AcceleratorState.__init__ = init
"""
    + SCRIPT
)
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    models.make_model().save_pretrained(folder / "model")
    models.make_tokenizer().save_pretrained(folder / "model")
    text = "".join(f"{i} cats sat on {i * 7 % 101} mats.\n" for i in range(200))
    (folder / "text.txt").write_text(text)
    (folder / "run.py").write_text(SCRIPT)
    (folder / "run_sharded.py").write_text(SHARDED)
    return folder


def run(folder, output, batch_size, *, processes=1, script="run.py", environment=None, more=()):
    launcher = f"-m torch.distributed.run --nproc-per-node {processes} --standalone".split()
    text = folder / "text.txt"
    files = [folder / "model", "-o", output, "--text", text, "--eval-text", f"text={text}"]
    options = (
        "--eval-tokens 4704 --block 32 --calibration-tokens 512 --eval-batch-size 4 --steps 4 "
        "--eval-every 2 --save-every 2 --lr 1e-2 --rank 4 --dropout 0 --distillation 0.5 "
        f"--batch-size {batch_size}"
    )
    command = [sys.executable, *(launcher if processes > 1 else ()), folder / script, "finetune"]
    command += [*files, *options.split(), *more]
    environment = ENVIRONMENT | (environment or {})
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return History.load(output / "history.jsonl")


@pytest.fixture(scope="module")
def single(folder):
    return run(folder, folder / "single", 4)


def assert_same(one, two):
    # the same weights: not even the last bit depends on how the batches were shared
    assert one.points[0].losses == two.points[0].losses
    assert one.points[0].sparsity == two.points[0].sparsity
    assert [p.step for p in one.points] == [p.step for p in two.points] == [0, 2, 4]
    for a, b in zip(one.points, two.points, strict=True):
        a, b = dataclasses.asdict(a), dataclasses.asdict(b)
        assert a["tokens"] == b["tokens"]
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)
        if a["step"]:
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["sparsity"] == pytest.approx(b["sparsity"], abs=1e-3)


def logits(folder, output):
    return models.logits(load_adapter(folder / "model", output / "adapter"), models.make_ids())


def test_two_processes_give_the_losses_of_one(folder, single, tmp_path):
    two = run(folder, tmp_path / "two", 2, processes=2)
    assert two.settings["processes"] == 2
    assert_same(single, two)
    expected = logits(folder, folder / "single")
    torch.testing.assert_close(logits(folder, tmp_path / "two"), expected, atol=1e-3, rtol=1e-3)


def test_sharded_weights_give_the_losses_of_one_process_and_are_saved(folder, single, tmp_path):
    output = tmp_path / "sharded"
    two = run(folder, output, 2, processes=2, script="run_sharded.py", environment=FSDP)
    assert_same(single, two)
    expected = logits(folder, folder / "single")
    torch.testing.assert_close(logits(folder, output), expected, atol=1e-3, rtol=1e-3)
    # that weights were sharded at all
    assert (output / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()
