"""The steps of the benchmark of several GPUs, on a CPU: a disk is the second device."""

import importlib.util
from pathlib import Path

import pytest
import torch

from cats.results import read_results

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "several_gpus.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("several_gpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(script, tmp_path):
    sizes = ["--shape=smollm2-135m", "--exact-layers=2", "--new-tokens=8", "--limit=120"]
    return script.parse([str(tmp_path / "out.jsonl"), "--device=cpu", "--text=none", *sizes])


def test_a_model_on_two_devices_gives_the_tokens_of_one_in_float32(script, options, capsys):
    script.split_worker(options, torch.float32)
    lines = read_results(options.output)
    variants = [line.variant for line in lines]
    assert variants == [
        "float32, transformers",
        "float32, transformers, two devices",
        "float32, cats.generate, two devices",
    ]
    assert all(line.same_as_one for line in lines)
    assert [line.difference for line in lines[1:]] == [0, 0]
    assert "engine='stream': the engine stream cannot run" in capsys.readouterr().out


def test_what_fails_is_named_and_leaves_earlier_lines(script, options, monkeypatch):
    script.add(options, "finetune", "DDP", 2, [1.0, 2.0], difference=0.0)
    monkeypatch.setattr(script, "launch", lambda *_, **__: False)
    failed = script.finetune(options)
    assert "finetune, one process" in failed
    assert "finetune, DDP" not in failed
    assert script.calibrate(options) == ["calibrate, 1 processes"]
    assert [line.variant for line in read_results(options.output)] == ["DDP"]


def test_a_process_that_hangs_is_ended(script, options):
    options.limit = 1
    assert not script.launch(options, 1, "-c", "import time; time.sleep(60)")
    assert not script.launch(options, 1, "-c", "raise SystemExit(3)")
    options.limit = 60
    assert script.launch(options, 1, "-c", "pass")


def test_a_command_sees_one_gpu_and_a_worker_all(script, options, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    options.device = "cuda"
    says = "import os, sys; sys.exit(os.environ['CUDA_VISIBLE_DEVICES'] != '{}')"
    assert script.launch(options, 1, "-c", says.format("0"))
    assert script.launch(options, 1, "-c", says.format("0,1"), "--worker=split-float32")
