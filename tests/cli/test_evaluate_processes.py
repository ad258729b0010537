"""Two processes evaluate as one does: with gloo, on the CPU, in the environment of torchrun."""

import json
import os
import socket
import sys

import pytest
from lm_eval.models.huggingface import HFLM

from cats import metrics
from cats.cli import main
from cats.evaluation.tasks import task_manager
from tests.evaluation.conftest import models_data

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def thresholds(command, checkpoint, text, tmp_path):
    path = tmp_path / "cats90.safetensors"
    options = ["--text", text, "--block", 64, "--sparsity", 0.9, "--tokens", 1024, "-o", path]
    code, _, err = command("calibrate", checkpoint, *options)
    assert code == 0, err
    return path


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def counted(counts, name, function):
    def call(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def run(folder, arguments, processes):
    """Run ``cats`` in processes that are forked from this one, since imports take long.

    Returns:
        What the first prints, and for each how many batches and prompts it ran.
    """
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["WORLD_SIZE"] = str(processes)
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            with (folder / f"out{rank}").open("w") as out, (folder / f"err{rank}").open("w") as err:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = out, err
                counts = {"batches": 0, "prompts": 0}
                metrics._to_device = counted(counts, "batches", metrics._to_device)
                HFLM._model_call = counted(counts, "prompts", HFLM._model_call)
                sys.argv = ["cats", *map(str, arguments)]
                try:
                    main()
                except SystemExit as ended:
                    code = ended.code or 0
            (folder / f"counts{rank}").write_text(json.dumps([*counts.values()]))
        finally:
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * processes, [(folder / f"err{r}").read_text() for r in range(processes)]
    silent = [(folder / f"out{rank}").read_text() for rank in range(1, processes)]
    assert silent == [""] * (processes - 1)
    counts = [json.loads((folder / f"counts{rank}").read_text()) for rank in range(processes)]
    return json.loads((folder / "out0").read_text()), counts


def read(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.get("environment", {}).pop("time", None)
    return lines


def test_two_processes_find_and_write_the_numbers_of_one(checkpoint, thresholds, text, tmp_path):
    data = models_data(tmp_path / "data")
    task_manager()  # takes seconds, and is kept: once, before the processes part
    # 13 batches and 5 questions do not divide by 2
    arguments = ["evaluate", checkpoint, "--thresholds", thresholds, "--text", text]
    arguments += ["--block", 64, "--tokens", 13 * 64, "--batch-size", 1, "--tasks", "piqa,sciq"]
    arguments += ["--limit", 5, "--data-dir", data, "--device", "cpu", "--json"]
    printed, files, counts = [], [], []
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        folder.mkdir()
        out, counted = run(folder, [*arguments, "-o", folder / "results"], processes)
        printed.append(out)
        counts.append(counted)
        paths = (folder / "results").rglob("*.jsonl")
        files.append({str(path.relative_to(folder)): read(path) for path in paths})
    assert len({row["value"] for row in printed[0] if row["metric"] == "perplexity"}) == 2
    assert printed[1] == printed[0]
    assert files[1] == files[0]
    assert len(files[0]) == 7
    ((batches, prompts),), both = counts
    assert [sum(column) for column in zip(*both, strict=True)] == [batches, prompts]
    assert all(0 < b < batches and 0 < p < prompts for b, p in both)
