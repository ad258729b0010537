"""llama.cpp as a process that waits for questions, and its own benchmark program."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats.errors import ConfigError, DataError

_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True)
class PeerRun:
    """One generation of the peer.

    Attributes:
        tokens: The new ones.
        times: When each was there, in seconds after the start.
        resident: Bytes that its process has in memory above what the interpreter had.
    """

    tokens: list[int]
    times: list[float]
    resident: int


class LlamaCpp:
    """A process with a model in llama.cpp; make one with :func:`llama_cpp`."""

    def __init__(self, process: subprocess.Popen[str], errors: Any) -> None:
        self._process, self._errors = process, errors
        self.release = f"cyllama {self._read()['release']}"

    def generate(self, ids: Sequence[int], new_tokens: int) -> PeerRun:
        """Greedy, from an empty cache, whatever the tokens are."""
        assert self._process.stdin is not None
        print(
            json.dumps({"ids": list(ids), "new_tokens": new_tokens}),
            file=self._process.stdin,
            flush=True,
        )
        return PeerRun(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or ["no message"]
            raise ConfigError(
                f"llama.cpp ended with code {self._process.returncode}: {lines[-1]}; the peer "
                "needs the package cyllama: pip install cyllama, or name an interpreter that has "
                "it with --peer-python"
            )
        result: dict[str, Any] = json.loads(line)
        return result


@contextmanager
def llama_cpp(python: str, path: Path, *, threads: int, context: int) -> Iterator[LlamaCpp]:
    """A process that has loaded the file; it ends with the block.

    Raises:
        ConfigError: If it cannot start, such as without the package ``cyllama``.
    """
    command = [python, str(_WORKER), str(path), str(threads), str(context)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        except OSError as error:
            raise ConfigError(f"--peer-python {python}: cannot start ({error})") from error
        try:
            yield LlamaCpp(process, errors)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


@dataclass(frozen=True, slots=True)
class BenchRun:
    """What ``llama-bench`` says of one test.

    Attributes:
        prompt: Tokens of the prompt; 0 where new tokens are timed.
        new_tokens: New tokens; 0 where a prompt is timed.
        milliseconds: Per token, or of the whole prompt: one of each repetition.
        commit: Of its sources, as it says.
    """

    prompt: int
    new_tokens: int
    milliseconds: list[float]
    commit: str


def run_llama_bench(
    program: Path, path: Path, *, threads: int, prompt: int, new_tokens: int, rounds: int
) -> list[BenchRun]:
    """Time a prompt and new tokens by the peer's own program.

    Raises:
        ConfigError: If the program cannot run.
        DataError: If it says something else than expected.
    """
    numbers = {"-t": threads, "-p": prompt, "-n": new_tokens, "-r": rounds, "-ngl": 0}
    options = [part for name, value in numbers.items() for part in (name, str(value))]
    command = [str(program), "-m", str(path), "-o", "json", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"--llama-bench {program}: cannot run ({error})") from error
    try:
        return [
            BenchRun(
                prompt=test["n_prompt"],
                new_tokens=test["n_gen"],
                # nanoseconds of a whole test
                milliseconds=[ns / 1e6 / max(1, test["n_gen"]) for ns in test["samples_ns"]],
                commit=test["build_commit"],
            )
            for test in json.loads(done.stdout)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{program}: expected llama-bench's JSON ({error!r})") from error
