import os

import pytest
import torch

from cats.cli import threads
from cats.cli.threads import OtherLoad, limited, quota, use_threads


class Load:
    """A machine on which other programs keep some processors busy."""

    def __init__(self, busy):
        self.busy = busy

    def processors(self):
        return self.busy


@pytest.fixture
def four_free(monkeypatch):
    """Four processors, and no chosen number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "processors", lambda: 4.0)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("default", "available", "busy", "expected"),
    [
        (4, 4, 0.0, 4),
        (4, 4, 0.4, 4),
        (4, 4, 0.6, 3),
        (4, 4, 3.9, 1),
        (4, 4, 9.0, 1),
        (2, 4, 1.0, 2),
        (4, 1.5, 0.0, 2),
        (4, 0.5, 0.0, 1),
        (4, 4, None, 4),
        (1, 4, 0.0, 1),
    ],
)
def test_threads_are_as_many_as_there_are_free_processors(default, available, busy, expected):
    assert limited(default, available, busy) == expected


def test_busy_machine_limits_the_threads_and_says_so(four_free):
    line = use_threads(None, Load(2.9))
    assert torch.get_num_threads() == 1
    assert line == (
        "1 thread instead of 4: other programs keep 2.9 of 4 processors busy "
        "(--threads N or OMP_NUM_THREADS=N decides otherwise)"
    )


def test_quiet_machine_leaves_torchs_number_and_says_nothing(four_free):
    assert use_threads(None, Load(0.1)) is None
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_a_user_has_decided_stays(four_free, monkeypatch, name):
    monkeypatch.setenv(name, "4")
    assert use_threads(None, Load(3.9)) is None
    assert torch.get_num_threads() == 4


def test_option_decides_on_a_busy_machine(four_free):
    assert use_threads(3, Load(3.9)) is None
    assert torch.get_num_threads() == 3


def test_command_takes_a_number_of_threads(command, checkpoint):
    before = torch.get_num_threads()
    arguments = ("generate", checkpoint, "abc", "--max-new-tokens", 2)
    code, _, err = command(*arguments, "--threads", before + 1)
    assert code == 0, err
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
    assert command(*arguments, "--threads", 0)[0] == 2


def stat(path, **seconds):
    """Write times in seconds as Linux does in ``/proc/stat``."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    ticks = [int(seconds.get(name, 0) * os.sysconf("SC_CLK_TCK")) for name in names]
    path.write_text("cpu  " + " ".join(map(str, ticks)) + " 0 0\ncpu0 1 2 3\n")


def test_load_is_what_the_others_did_meanwhile(tmp_path, monkeypatch):
    path, processors = tmp_path / "stat", os.cpu_count()
    own = iter([0.0, 3.0])
    monkeypatch.setattr(os, "times", lambda: os.times_result((next(own), 0.0, 0.0, 0.0, 0.0)))
    stat(path, user=1000, idle=5000)
    load = OtherLoad(path)
    # ten seconds on all processors; three of the busy ones are ours
    stat(path, user=1004, system=1, idle=5000 + 10 * processors - 5)
    assert load.processors() == pytest.approx(0.2)


def test_load_is_unknown_where_the_system_does_not_say(tmp_path):
    assert OtherLoad(tmp_path / "absent").processors() is None


def test_quota_of_a_control_group_counts(tmp_path):
    assert quota(tmp_path) == float("inf")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert quota(tmp_path) == float("inf")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert quota(tmp_path) == 1.5
