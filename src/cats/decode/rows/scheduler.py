"""Decodes all open sessions together, in a thread of its own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cats.decode.rows.engine import RowEngine
from cats.decode.rows.frames import forget_frames
from cats.decode.rows.inbox import Inbox
from cats.decode.rows.lines import Lines
from cats.decode.rows.pieces import PieceSizes
from cats.decode.rows.prompts import borrow, take_turn
from cats.decode.rows.reads import EVERY, most_overdue
from cats.decode.rows.row import Row, Ticket
from cats.decode.rows.unread import Unread
from cats.decode.rows.watch import Change
from cats.decode.tracing import exclusion


class Scheduler:
    """Admits sessions in the order in which they came, runs their prompts in pieces, and steps."""

    def __init__(
        self,
        engine: RowEngine,
        inbox: Inbox,
        *,
        rows: int,
        vocabulary: int,
        longest_wait: float,
        change: Callable[[], Change | None] = lambda: None,
        make_engine: Callable[[], RowEngine] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            engine: Runs the rows.
            inbox: Where sessions come from.
            rows: How many rows run together at most.
            vocabulary: Size of the vocabulary.
            longest_wait: Seconds that pieces of prompts may take between two steps.
            change: Asked before sessions are admitted: what has changed of the model since the
                last time.
            make_engine: Makes another engine, for the model as it is then. None keeps the first.
            clock: Seconds, from any start.
        """
        self._engine, self._inbox = engine, inbox
        self._rows, self._vocabulary = rows, vocabulary
        self._longest_wait, self._clock = longest_wait, clock
        self._change, self._make_engine, self._outdated = change, make_engine, False
        self._lines = Lines(engine.lines, engine.capacity)
        self._sizes = PieceSizes(longest_wait)
        self._waiting: deque[Ticket] = deque()
        self._prefilling: list[Row] = []
        self._decoding: list[Row] = []
        self._unread: deque[Unread] = deque()
        self._admitted = 0

    def run(self) -> None:
        """Serve until the inbox is closed; this is all that a thread does."""
        failure: BaseException | None = None
        try:
            while self.turn():
                pass
        except BaseException as error:  # all sessions raise it, and so does the next open()
            failure = error
            forget_frames(error)
        self._inbox.end(failure)
        for row in (*self._prefilling, *self._decoding):
            row.progress.end("cancelled", failure)
        for ticket in self._waiting:
            ticket.progress.end("cancelled", failure)
        # errors that users keep hold the frames that raised them, and so this object
        self._engine.free()
        vars(self).clear()

    def turn(self) -> bool:
        """Take in what is new, admit, run pieces of prompts, and step once.

        Returns:
            False once the inbox is closed.
        """
        if not self._take_new():
            return False
        with torch.inference_mode():
            start = self._clock()
            self._leave_cancelled()
            self._admit(start)
            self._prefill(start)
            self._step()
        return True

    def is_busy(self) -> bool:
        return bool(self._waiting or self._prefilling or self._decoding)

    def _take_new(self) -> bool:
        if idle := not self.is_busy():
            self._unread.clear()  # steps of rows that have ended, which would stay until the next
        tickets = self._inbox.take(block=idle)
        self._waiting.extend(tickets or ())
        return tickets is not None

    def _leave_cancelled(self) -> None:
        for row in [*self._prefilling, *self._decoding]:
            if row.progress.cancelled:
                self._end(row, "cancelled")
        for ticket in [t for t in self._waiting if t.progress.cancelled]:
            self._waiting.remove(ticket)
            ticket.progress.end("cancelled")

    def _admit(self, start: float) -> None:
        """Give lines to those who have waited longest, while the rows that decode may wait."""
        asked = False
        while (
            self._waiting
            and len(self._prefilling) + len(self._decoding) < self._rows
            and self._lines.has_free()
        ):
            # each takes time, which is that of the pieces as well
            if asked and self._decoding and self._clock() - start > self._longest_wait / 2:
                return
            ticket = self._waiting[0]
            try:
                if not asked and not self._follow_model():
                    return
                asked = True
                self._prefilling.append(self._admitted_row(ticket))
            except Exception as error:  # its options, or the model as it is now
                ticket.progress.end("error", error)
            self._waiting.popleft()

    def _follow_model(self) -> bool:
        """See what has changed of the model; whether the engine is one for it as it is now."""
        change = self._change()
        if change is not None:
            self._lines.forget()
        if change == "structure":
            self._engine.forget()
            self._outdated = self._make_engine is not None
        if self._outdated and not (self._prefilling or self._decoding):
            assert self._make_engine is not None
            self._unread.clear()
            # the old cache goes before the new one comes
            self._engine.free()
            self._engine = self._make_engine()
            self._lines = Lines(self._engine.lines, self._engine.capacity)
            self._outdated = False
        return not self._outdated

    def _admitted_row(self, ticket: Ticket) -> Row:
        line = self._lines.take(ticket.prompt)
        self._admitted += 1
        device = self._engine.device
        try:
            row = Row(ticket, line, self._admitted, device=device, vocabulary=self._vocabulary)
            # the last token runs in any case, since it gives the first new one
            kept = min(line.shared_with(row.prompt), len(row.prompt) - 1)
            self._engine.clear(line.index, kept, line.written)
            line.written = kept
            row.reached(kept)
            row.progress.reused = kept
        except Exception:
            line.forget()
            self._lines.give_back(line)
            raise
        return row

    # --- prompts

    def _prefill(self, start: float) -> None:
        """Run pieces of prompts, for as long as the rows that decode may wait."""
        begin = now = self._clock()
        alone, ran = not self._decoding, 0
        waited = 0.0 if alone else (now - start) / self._longest_wait
        left = self._sizes.alone if alone else self._sizes.within(1 - waited)
        while left > 0 and (row := self._next_prompt()) is not None:
            count = min(left, len(row.prompt) - row.done)
            piece_start, before = now, row.done
            with self._ending(row):
                self._run_piece(row, count)
            # a piece that failed says nothing about how long one takes
            left, ran = left - count, ran + row.done - before
            now = self._clock()
            # if another piece took as long, those who decode would wait too long
            if alone or now - start + (now - piece_start) > self._longest_wait:
                break
        if ran:
            self._sizes.took(ran, now - begin)

    def _next_prompt(self) -> Row | None:
        while (row := take_turn(self._prefilling)) is not None:
            with self._ending(row):
                borrow(row, self._lines, self._engine)
                return row
        return None

    def _run_piece(self, row: Row, count: int) -> None:
        row.line.writes(row.done + count)
        with exclusion.running():
            token = self._engine.prefill(row, count)
            self._engine.synchronize()
        row.reached(row.done + count)
        if token is not None:
            self._prefilling.remove(row)
            self._decoding.append(row)
            self._started([row], token)

    # --- steps

    def _step(self) -> None:
        self._read(self._engine.lag)  # the first tokens of prompts wait for no step
        # cached lines that follow each other are read without a copy
        rows = [row for row in self._decoding if row.started < row.limit]
        rows.sort(key=lambda row: row.line.index)
        counted = most_overdue(rows)
        if together := [row for row in rows if row is not counted]:
            self._step_rows(together)
        if counted is not None and counted.progress.reason is None:
            self._counted_step(counted)
        self._read(self._engine.lag if rows else 0)

    def _read(self, most: int) -> None:
        """Pass on tokens, until those of ``most`` steps are still on their way."""
        while len(self._unread) > most:
            for row, token, error in self._unread.popleft():
                # another step may have been started before the host saw that the row has ended
                if row.progress.reason is not None:
                    continue
                with self._ending(row):
                    if error is not None:
                        raise error
                    if (reason := row.take(token)) is not None:
                        self._end(row, reason)

    def _step_rows(self, rows: Sequence[Row]) -> None:
        """One step. If it fails, each row runs by itself, so that only the guilty ones end."""
        for row in rows:
            row.line.writes(row.position + 1)
        try:
            with exclusion.running():
                tokens = self._engine.step(rows)
        except Exception as error:  # whatever a model raises
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            self._read(0)
            for row in rows:
                if row.progress.reason is None:
                    self._step_rows([row])
        else:
            self._started(rows, tokens)

    def _counted_step(self, row: Row) -> None:
        row.line.writes(row.position + 1)
        try:
            with exclusion.running():
                token, share = self._engine.counted_step(row)
        except Exception as error:  # as above
            self._fail(row, error)
            return
        row.counts_at = row.started + EVERY
        row.progress.reads.append((row.started + 1, share))
        self._started([row], token)

    def _fail(self, row: Row, error: Exception) -> None:
        """End a row whose step has failed, unless a token that is still unread ends it."""
        self._read(0)
        if row.progress.reason is None:
            self._end(row, "error", error)

    def _started(self, rows: Sequence[Row], tokens: Tensor) -> None:
        for row in rows:
            row.start()
        self._unread.append(Unread(rows, tokens))

    # --- ends

    @contextmanager
    def _ending(self, row: Row) -> Iterator[None]:
        """What is raised within the block ends this row, and no other."""
        try:
            yield
        except Exception as error:  # the session's own code, or the model with its text
            self._end(row, "error", error)

    def _end(self, row: Row, reason: str, error: Exception | None = None) -> None:
        for rows in (self._prefilling, self._decoding):
            if row in rows:
                rows.remove(row)
        self._lines.give_back(row.line)
        if error is not None:
            forget_frames(error)
        row.progress.end(reason, error)
