"""A soak: ``python -m tests.decode.rows.soak --sessions 2000``.

Threads open many sessions on a tiny model: greedy and sampled ones, with prompts that begin alike.
Some are cancelled or dropped, some raise in a processor, criterion or callback, and passes of the
model run out of memory at random. Each session must end, with the tokens that its prompt gives
alone, or with the first ones of them. In the end nothing of them may be left.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import threading
import time
from collections import Counter
from weakref import WeakSet

import torch
from transformers import LlamaConfig

import cats
from cats.decode.rows.lines import Lines
from cats.decode.rows.modules import ModuleRows
from cats.decode.rows.progress import Progress
from cats.decode.rows.row import Row, Ticket
from cats.decode.rows.traced import TracedSteps
from tests.models import make_ids, make_model

ROWS, CONTEXT, LINES = 8, 96, 6
LENGTHS, NEW = (1, 7, 30, 60), (1, 9, 30)
OPEN_AT_ONCE = 10  # per thread
_NO_MEMORY = "injected: out of memory"


class InjectedError(Exception):
    """What the sessions' own code raises."""


class Faults:
    """Lets passes of the model run out of memory, before or after they have written the cache."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.count = share, 0
        self._random = random.Random(seed)
        self._originals = [
            (owner, name, getattr(owner, name))
            for owner, name in (
                (ModuleRows, "logits"),
                (ModuleRows, "single"),
                (TracedSteps, "logits"),
            )
        ]

    def __enter__(self) -> Faults:
        for owner, name, method in self._originals:
            setattr(owner, name, self._failing(method))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, method in self._originals:
            setattr(owner, name, method)

    def _failing(self, method):
        def run(*args):
            draw = self._random.random()
            result = None if draw < self.share / 2 else method(*args)
            if draw < self.share:
                self.count += 1
                raise torch.OutOfMemoryError(_NO_MEMORY)
            return result

        return run


class Case:
    """One session: what it asks for, and what is done to it."""

    def __init__(self, drawn: random.Random) -> None:
        self.seed, self.length = drawn.randrange(6), drawn.choice(LENGTHS)
        self.new, self.sampled = drawn.choice(NEW), drawn.random() < 0.4
        self.fate = drawn.choices(
            ("whole", "cancelled", "dropped", "processor", "criterion", "callback"),
            (60, 10, 5, 5, 5, 5),
        )[0]
        self.after = drawn.randrange(12)  # tokens

    @property
    def key(self):
        return self.seed, self.length, self.new, self.sampled

    @property
    def prompt(self):
        ids = make_ids(1, self.length, self.seed)
        if self.seed % 2 == 0:  # they begin alike
            ids[:, :24] = make_ids(1, 24, 99)[:, : self.length]
        return ids

    @property
    def options(self):
        options = dict(max_new_tokens=self.new, eos_token_id=None, do_sample=self.sampled)
        return options | (dict(seed=self.seed, temperature=1.5) if self.sampled else {})

    def open(self, sessions):
        def fail(*args):
            if args[0].shape[1] >= self.length + self.after:
                raise InjectedError(self.fate)
            return args[1] if self.fate == "processor" else torch.zeros(1, dtype=torch.bool)

        def callback(token):
            raise InjectedError(self.fate)

        extra = {
            "processor": dict(logits_processor=[fail]),
            "criterion": dict(stopping_criteria=[fail]),
            "callback": dict(callback=callback),
        }
        return sessions.open(self.prompt, **self.options, **extra.get(self.fate, {}))

    def check(self, session, expected) -> str:
        """How it ended, in words.

        Raises:
            AssertionError: If it has said something else than alone, or ended in another way.
        """
        session._progress.wait(120)
        tokens, reason, error = session.so_far(), session.reason, session.error
        assert reason is not None, "a session has not ended"
        assert tokens == expected[: len(tokens)], (self.key, self.fate, tokens, expected)
        if isinstance(error, torch.OutOfMemoryError):
            assert str(error) == _NO_MEMORY
            return "out of memory"
        if reason == "error":
            assert isinstance(error, InjectedError), error
            assert error.args == (self.fate,)
            return self.fate
        assert reason in ("length", "cancelled")
        assert reason == "length" or self.fate in ("cancelled", "dropped", "callback")
        assert reason != "length" or len(tokens) == self.new
        return reason


def soak(count: int, *, seed: int = 0, threads: int = 4, memory_faults: float = 0.01) -> Counter:
    """Run so many sessions; returns how many ended in which way, and what was measured.

    Raises:
        AssertionError: If something is wrong.
    """
    torch.manual_seed(0)
    model = make_model(LlamaConfig)
    drawn = random.Random(seed)
    cases = [Case(drawn) for _ in range(count)]
    expected = {}
    for case in cases:
        if case.key not in expected:
            ids = cats.generate(model, case.prompt, **case.options)
            expected[case.key] = ids[0, case.length :].tolist()
    endings, failures, waits = [], [], []
    before, others = (_alive(), threading.active_count()), WeakSet(_all(Lines))
    sessions = cats.Sessions(model, rows=ROWS, context=CONTEXT, cache_tokens=LINES * CONTEXT)

    def work(sessions, mine):
        try:
            open_cases = []
            for case in mine:
                open_cases.append((case, time.monotonic(), case.open(sessions)))
                if case.fate == "dropped":
                    open_cases.pop()
                    endings.append("dropped")
                elif case.fate == "cancelled":
                    tokens = open_cases[-1][2].tokens()
                    try:
                        for _ in range(case.after % 4):
                            next(tokens, None)
                    except torch.OutOfMemoryError:
                        pass
                    open_cases[-1][2].cancel()
                if len(open_cases) == OPEN_AT_ONCE:
                    finish(*open_cases.pop(0))
            for one in open_cases:
                finish(*one)
        except BaseException as error:
            failures.append(error)
            raise

    def finish(case, opened, session):
        endings.append(case.check(session, expected[case.key]))
        waits.append(time.monotonic() - opened)

    resident = []
    with sessions, Faults(memory_faults, seed) as faults:
        for part in range(4):  # what is resident after each quarter
            quarter = cases[part * count // 4 : (part + 1) * count // 4]
            workers = [
                threading.Thread(target=work, args=(sessions, quarter[i::threads]))
                for i in range(threads)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            if failures:
                raise failures[0]
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        # memory suffices again: all lines are free, and give what a first session gives
        faults.share = 0
        last = [(case, case.open(sessions)) for case in cases if case.fate == "whole"][:ROWS]
        for case, session in last:
            assert case.check(session, expected[case.key]) == "length"
        del session, last
        lines = [line for one in _all(Lines) if one not in others for line in one]
        deadline = time.monotonic() + 20
        while any(line.used for line in lines) and time.monotonic() < deadline:
            time.sleep(0.01)  # a dropped session leaves with the next turn
        assert lines
        assert not any(line.used for line in lines), "a line is not given back"
    del sessions, workers
    _check_nothing_is_left(*before)
    ended = Counter(endings)
    ended["faults of memory"] = faults.count
    ended["longest wait, ms"] = int(1e3 * max(waits))
    ended["growth of memory after the first quarter, MB"] = int(resident[-1] - resident[0])
    return ended


def _check_nothing_is_left(objects: dict[type, int], threads: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = [kind.__name__ for kind, count in _alive().items() if count > objects[kind]]
        if not left and threading.active_count() <= threads:
            return
        time.sleep(0.05)
    raise AssertionError(f"left: {left}, {threading.active_count() - threads} threads")


def _alive() -> dict[type, int]:
    """How many of what belongs to sessions are there."""
    return {kind: len(_all(kind)) for kind in (Row, Ticket, Progress, Lines)}


def _all(kind: type) -> list:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    for name, number in soak(arguments.sessions, seed=arguments.seed).items():
        print(f"{name}: {number}")
    print(f"{arguments.sessions} sessions in {time.monotonic() - start:.0f} seconds, all right")


if __name__ == "__main__":
    main()
