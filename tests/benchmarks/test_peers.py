"""The comparison with llama.cpp, against a stand-in for its package and its program."""

import json
import sys

import pytest
import torch

from cats import formats
from cats.benchmarks.peers import Case, measure
from cats.benchmarks.peers.llama_cpp import llama_cpp, run_llama_bench
from cats.errors import ConfigError, DataError
from cats.report import peers
from cats.results import (
    OWN,
    PEER,
    PEER_BENCH,
    PeerMemory,
    PeerPrefillTime,
    PeerTokenTime,
    append_results,
    read_results,
)
from tests import models

# Counts up from the last token that it was given.
_PACKAGE = """
class LlamaModelParams: pass
class LlamaContextParams: pass
class LlamaModel:
    def __init__(self, path, options): open(path, "rb").close()
class LlamaContext:
    def __init__(self, model, settings): self.ids = None
    def kv_cache_clear(self): self.ids = []
    def decode(self, batch):
        ids, position = batch
        assert position == len(self.ids)
        self.ids += ids
class LlamaSampler:
    def add_greedy(self): pass
    def sample(self, context, index): return context.ids[-1] + 1
def llama_batch_get_one(ids, position): return ids, position
def disable_logging(): print("noise")
def ggml_backend_load_all(): pass
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has the stand-in as the package ``cyllama``."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "cyllama" / "llama").mkdir(parents=True)
    for name in ("cyllama/__init__.py", "cyllama/llama/__init__.py"):
        (folder / name).write_text("")
    (folder / "cyllama" / "llama" / "llama_cpp.py").write_text(_PACKAGE)
    (folder / "cyllama-0.9.dist-info").mkdir()
    (folder / "cyllama-0.9.dist-info" / "METADATA").write_text("Name: cyllama\nVersion: 0.9\n")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A stand-in for ``llama-bench``."""
    tests = [
        {"n_prompt": 4, "n_gen": 0, "samples_ns": [8_000_000, 6_000_000], "build_commit": "abc"},
        {"n_prompt": 0, "n_gen": 4, "samples_ns": [8_000_000, 8_000_000], "build_commit": "abc"},
    ]
    path = tmp_path_factory.mktemp("program") / "llama-bench"
    path.write_text(f"#!/bin/sh\ncat << 'END'\n{json.dumps(tests)}\nEND\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    model = models.make_model(hidden_size=32, intermediate_size=64, head_dim=16)
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    formats.export_gguf(model, path, kind="q8_0")
    return path


def make_case(file, **changes):
    common = dict(
        model="tiny", prompt_length=3, new_tokens=4, prefill=5, rounds=2, read_bytes=2**20
    )
    return Case(path=file, dtype=torch.float32, **common | changes)


@pytest.fixture(scope="module")
def results(file, python, program):
    case = make_case(file, load=1, peer_python=python, llama_bench=program)
    return list(measure(case, models.make_ids(), commit="abc"))


def test_each_program_is_timed_at_each_target(results):
    times = [r for r in results if isinstance(r, PeerTokenTime)]
    assert [(r.program, r.sparsity) for r in times] == [
        (OWN, 0.0), (OWN, 0.5), (PEER, 0.0), (PEER_BENCH, 0.0),
    ]  # fmt: skip
    dense, sparse, peer, program = times
    assert dense.kind == "Q8_0"
    assert dense.load == 1
    assert sparse.over_dense == dense.value / sparse.value
    assert dense.over_peer == peer.value / dense.value
    assert 0 < sparse.bytes < dense.bytes == peer.bytes
    assert dense.limit_ms == pytest.approx(peer.limit_ms)
    assert dense.agreed is not None
    assert peer.release == "cyllama 0.9"
    assert (program.value, program.release) == (2.0, "abc")
    prompts = [r for r in results if isinstance(r, PeerPrefillTime)]
    assert [(r.program, r.prompt_length) for r in prompts] == [
        (OWN, 5), (OWN, 5), (PEER, 5), (PEER_BENCH, 4),
    ]  # fmt: skip
    assert prompts[-1].value == 7.0
    memory = [r for r in results if isinstance(r, PeerMemory)]
    assert [r.program for r in memory] == [OWN, PEER]


def test_results_are_shown_and_quoted_from_their_file(results, tmp_path):
    path = tmp_path / "peer.jsonl"
    append_results(path, results)
    read = read_results(path)
    tokens, prompts, memory = peers.tables(read)
    assert [row[1] for row in tokens.rows] == ["dense", "cats-50", "llama.cpp", "llama-bench"]
    assert len(prompts.rows) == 4
    assert [row[1] for row in memory.rows] == ["dense", "llama.cpp"]
    summary = peers.summary(read)
    assert summary.columns == ["model", "", "1 busy"]
    assert summary.rows[0][2].endswith(")")
    assert len(peers.plot(read).axes) == 1
    with pytest.raises(DataError, match="cats bench peer"):
        peers.tables([])


def test_a_peer_that_cannot_start_says_what_it_needs(file):
    with (
        pytest.raises(ConfigError, match="pip install cyllama"),
        llama_cpp(sys.executable, file, threads=1, context=8),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="cannot start"),
        llama_cpp("/no/python", file, threads=1, context=8),
    ):
        pass
    with pytest.raises(ConfigError, match="cannot run"):
        run_llama_bench(file, file, threads=1, prompt=1, new_tokens=1, rounds=1)


def test_the_process_of_the_peer_ends_with_its_block(file, python):
    with llama_cpp(python, file, threads=1, context=8) as peer:
        assert peer.generate([5, 6], 2).tokens == [7, 8]
        process = peer._process
    assert process.returncode is not None


def test_wrong_cases_are_refused(file):
    for changes in ({"rounds": 1}, {"sparsities": (1.0,)}, {"threads": 0}, {"load": -1}):
        with pytest.raises(ConfigError):
            make_case(file, **changes)
    with pytest.raises(DataError, match="too few"):
        list(measure(make_case(file, peer_python=None), models.make_ids(1, 4)))
