"""Several processes calibrate one model: run under torchrun with gloo, on the CPU."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import cats
from tests import models

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SCRIPT = "from cats.cli import main; main()"
COMMAND = [sys.executable, "-c", SCRIPT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    models.make_model().save_pretrained(folder / "model")
    models.make_tokenizer().save_pretrained(folder / "model")
    text = "".join(f"{i} cats sat on {i * 7 % 101} mats and {i * i}. " for i in range(2000))
    (folder / "text.txt").write_text(text)
    (folder / "run.py").write_text(SCRIPT)
    return folder


def arguments(folder, output, tokens=4096):
    sizes = f"--block 64 --batch-size 2 --tokens {tokens} --eval-tokens 64"
    files = [folder / "model", "--text", folder / "text.txt", "-o", output]
    return ["calibrate", *files, *sizes.split()]


def test_two_processes_find_the_thresholds_of_one_bit_for_bit(folder, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    subprocess.run([*COMMAND, *arguments(folder, one)], env=ENVIRONMENT, check=True)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, *launcher, folder / "run.py", *arguments(folder, two)]
    subprocess.run(command, env=ENVIRONMENT, check=True)
    assert one.read_bytes() == two.read_bytes()
    config = cats.CatsConfig.load(two)
    assert config.calibration_tokens == 4096
    assert all(t > 0 for t in config.thresholds.values())


def test_control_c_leaves_no_half_written_file(folder, tmp_path):
    output, statistics = tmp_path / "thresholds.safetensors", tmp_path / "statistics.safetensors"
    # a shell lets its background jobs ignore SIGINT, and children inherit that
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    command = [sys.executable, "-c", listen + SCRIPT]
    command += [*arguments(folder, output, tokens=10**9), "--statistics", statistics]
    # the text is repeated, so that the run is long enough to be stopped in its middle
    command += ["--text", folder / "text.txt"] * 20
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not statistics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] == [statistics.name]
    assert cats.Statistics.load(statistics).tokens > 0
