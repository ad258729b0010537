"""One program of the ``openai`` client asks both servers: ``make test-vllm`` runs this test."""

import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests import models
from tests.integrations.vllm.engine.conftest import ENVIRONMENT, make_dense, make_sparse, save

pytest.importorskip("vllm", reason="make test-vllm installs it in an environment of its own")

CLIENT = Path(__file__).parents[4] / "examples" / "openai_client.py"
# the command `vllm serve` looks for a distribution named vllm
VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", "--enforce-eager"]


@contextmanager
def serving(*command):
    """A server on a free port, with its address; it ends after the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = [sys.executable, *command, "--port", port, "--host", "127.0.0.1"]
    server = subprocess.Popen([*map(str, arguments)], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def test_the_same_program_gets_the_same_answers_from_both_servers(folder):
    model = make_dense(LlamaConfig)
    make_sparse(model)
    path = save(model, folder / "served")
    tokenizer = models.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    vllm = [*VLLM, "--max-model-len", 128, "--model", path]
    cats = ["-m", "cats", "serve", path, "--context", 128]
    printed = []
    for command in (vllm, cats):
        with serving(*command) as url:
            done = subprocess.run(
                [sys.executable, CLIENT, url, "Who sat on the mat?", "--tokens", "12"],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout.splitlines())
    assert len(printed[0]) == 6
    assert printed[0] == printed[1]
