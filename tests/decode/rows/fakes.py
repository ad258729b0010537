"""An engine that computes nothing, and sessions for a scheduler that a test drives by hand."""

import torch

from cats.decode.options import Options
from cats.decode.request import Request
from cats.decode.rows.inbox import Inbox
from cats.decode.rows.progress import Progress
from cats.decode.rows.row import Ticket
from cats.decode.rows.scheduler import Scheduler
from cats.decode.sampling import Sampling


class FakeEngine:
    """Each next token is 1 more than the position of the newest one. Time is what work takes.

    Attributes:
        now: Seconds of its own clock.
        log: What was run, in order: ``("prefill", prompt's first token, start, count)``,
            ``("step", first tokens)`` and ``("copy", source, target, start, stop)``.
        broken: First tokens of prompts whose rows make a step raise.
    """

    device = torch.device("cpu")

    def __init__(self, *, lines=4, capacity=64, lag=0, per_token=1e-3, per_step=5e-3):
        self.lines, self.capacity, self.lag = lines, capacity, lag
        self.per_token, self.per_step = per_token, per_step
        self.now, self.log, self.broken = 0.0, [], set()
        self.freed = False

    def prefill(self, row, count):
        first = int(row.prompt[0])
        self.log.append(("prefill", first, row.done, count))
        if first in self.broken:
            raise ValueError("broken prompt")
        self.now += count * self.per_token
        return self._next([row]) if row.done + count == len(row.prompt) else None

    def step(self, rows):
        firsts = [int(row.prompt[0]) for row in rows]
        self.log.append(("step", *firsts))
        self.now += self.per_step
        if self.broken.intersection(firsts):
            raise ValueError("broken step")
        return self._next(rows)

    def counted_step(self, row):
        self.log.append(("counted", int(row.prompt[0])))
        self.now += self.per_step
        if int(row.prompt[0]) in self.broken:
            raise ValueError("broken step")
        return self._next([row]), 0.5

    def copy(self, source, target, start, stop):
        self.log.append(("copy", source, target, start, stop))

    def clear(self, line, start, stop):
        pass

    def forget(self):
        self.log.append(("forget",))

    def free(self):
        self.freed = True

    def synchronize(self):
        pass

    def _next(self, rows):
        for row in rows:
            if row.choice.options.processors is not None:
                row.choice.token(torch.zeros(1, 8))
        return torch.tensor([row.position + 1 for row in rows])


def options(new=4, **changes):
    return Options(
        **dict(
            sampling=Sampling(),
            seed=0,
            max_new_tokens=new,
            eos_token_ids=(),
            pad_token_id=0,
            stop_strings=(),
        )
        | changes
    )


class Driven:
    """A scheduler that runs turn by turn."""

    def __init__(self, engine, *, rows=4, **changes):
        self.engine, self.inbox = engine, Inbox()
        self.scheduler = Scheduler(
            engine,
            self.inbox,
            rows=rows,
            vocabulary=1000,
            longest_wait=0.05,
            clock=lambda: engine.now,
            **changes,
        )

    def open(self, prompt, new=4, *, count_reads=False, on_change=None, **changes):
        ids = torch.tensor([prompt])
        request = Request(
            ids=ids,
            mask=torch.ones_like(ids, dtype=torch.bool),
            options=options(new, **changes),
            extras={},
            tokenizer=None,
        )
        progress = Progress(on_change)
        self.inbox.put(Ticket(request, progress, count_reads=count_reads))
        return progress

    def turn(self, count=1):
        for _ in range(count):
            # it would wait for ever
            assert self.scheduler.is_busy() or not self.inbox._queue.empty(), "nothing to do"
            self.scheduler.turn()

    def finish(self, *sessions):
        for _ in range(1000):
            if all(session.reason for session in sessions):
                return
            self.turn()
        raise AssertionError(f"not ended: {[session.reason for session in sessions]}")


def expected(prompt, new=4):
    """The tokens of :class:`FakeEngine`."""
    return [*range(len(prompt), len(prompt) + new)]
