"""Busy processes end with the block, whatever ends it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cats.benchmarks.busy import busy_processes
from cats.errors import ConfigError

# A process that runs busy ones, says their ids, and waits.
_HOST = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for its jobs
from cats.benchmarks.busy import busy_processes
with busy_processes(2) as ids:
    print(*ids, flush=True)
    time.sleep(60)
"""


def runs(pid):
    """Whether a process is there and has not ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_end(ids, seconds=10):
    deadline = time.monotonic() + seconds
    while any(map(runs, ids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(runs, ids))


def test_they_compute_and_end_with_the_block():
    with busy_processes(2) as ids:
        assert len(ids) == 2
        assert all(map(runs, ids))
        deadline = time.monotonic() + 10
        while not all(ticks(pid) for pid in ids) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert all(ticks(pid) for pid in ids)
    assert not any(map(runs, ids))


def ticks(pid):
    """Time of a processor that a process has had."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return int(file.read().rpartition(")")[2].split()[11])


def test_an_error_ends_them():
    with pytest.raises(ZeroDivisionError), busy_processes(1) as ids:
        raise ZeroDivisionError
    assert not any(map(runs, ids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_them(number):
    host = subprocess.Popen(
        [sys.executable, "-c", _HOST],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with host:
        ids = [int(pid) for pid in host.stdout.readline().split()]
        assert all(map(runs, ids))
        host.send_signal(number)
        host.wait(10)
    assert all_end(ids)


def test_signals_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with busy_processes(0) as ids:
        assert ids == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_negative_load_is_refused():
    with pytest.raises(ConfigError, match="0 or more"), busy_processes(-1):
        pass
