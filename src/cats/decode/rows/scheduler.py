"""Decodes all open sessions together, in a thread of its own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from traceback import walk_stack, walk_tb

import torch
from torch import Tensor

from cats.decode.rows.engine import RowEngine
from cats.decode.rows.inbox import Inbox
from cats.decode.rows.lines import Ids, Lines, common_length
from cats.decode.rows.pieces import LARGEST, PieceSizes
from cats.decode.rows.reads import EVERY
from cats.decode.rows.row import Row, Ticket
from cats.decode.tracing import exclusion

# Copying slots costs some launches for each layer, and so does running a few tokens.
_WORTH_COPYING = 16


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
        has_changed: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            engine: Runs the rows.
            inbox: Where sessions come from.
            rows: How many rows run together at most.
            vocabulary: Size of the vocabulary.
            longest_wait: Seconds that pieces of prompts may take between two steps.
            has_changed: Asked before a session is admitted: whether the model has changed since
                the last time.
            clock: Seconds, from any start.
        """
        self._engine, self._inbox = engine, inbox
        self._rows, self._vocabulary = rows, vocabulary
        self._longest_wait, self._has_changed, self._clock = longest_wait, has_changed, clock
        self._lines = Lines(engine.lines, engine.capacity)
        self._sizes = PieceSizes(longest_wait)
        self._waiting: deque[Ticket] = deque()
        self._prefilling: list[Row] = []
        self._decoding: list[Row] = []
        self._unread: deque[_Unread] = deque()
        self._admitted = 0

    def run(self) -> None:
        """Serve until the inbox is closed; this is all that a thread does."""
        failure: BaseException | None = None
        try:
            while self.turn():
                pass
        except BaseException as error:  # all sessions raise it, and so does the next open()
            failure = error
        self._inbox.end(failure)
        for row in (*self._prefilling, *self._decoding):
            row.progress.end("cancelled", failure)
        for ticket in self._waiting:
            ticket.progress.end("cancelled", failure)
        # errors that users keep hold the frames that raised them, and so this object
        del self._engine, self._has_changed, self._prefilling, self._decoding, self._unread

    def turn(self) -> bool:
        """Take in what is new, admit, run pieces of prompts, and step once.

        Returns:
            False once the inbox is closed.
        """
        if not self._take_new():
            return False
        with torch.inference_mode():
            self._leave_cancelled()
            self._admit()
            self._prefill()
            self._step()
        return True

    def _take_new(self) -> bool:
        idle = not (self._waiting or self._prefilling or self._decoding)
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

    def _admit(self) -> None:
        """Give lines to those who have waited longest."""
        while (
            self._waiting
            and len(self._prefilling) + len(self._decoding) < self._rows
            and self._lines.has_free()
        ):
            ticket = self._waiting.popleft()
            try:
                if self._has_changed():
                    self._lines.forget()
                self._prefilling.append(self._admitted_row(ticket))
            except Exception as error:  # its options, or the model as it is now
                ticket.progress.end("error", error)

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

    def _prefill(self) -> None:
        """Run pieces of prompts, for as long as the rows that decode may wait."""
        start = now = self._clock()
        alone, ran = not self._decoding, 0
        left = LARGEST if alone else self._sizes.size
        while left > 0 and (row := self._next_prompt()) is not None:
            count = min(left, len(row.prompt) - row.done)
            piece_start = now
            with self._ending(row):
                self._run_piece(row, count)
            left, ran = left - count, ran + count
            now = self._clock()
            # if another piece took as long, those who decode would wait too long
            if alone or now - start + (now - piece_start) > self._longest_wait:
                break
        if ran:
            self._sizes.took(ran, now - start)

    def _next_prompt(self) -> Row | None:
        """The row whose turn it is; prompts take turns."""
        for row in list(self._prefilling):
            if not self._waits_for_another(row):
                self._prefilling.remove(row)
                self._prefilling.append(row)
                with self._ending(row):
                    self._borrow(row)
                    return row
        return None

    def _waits_for_another(self, row: Row) -> bool:
        """Whether an older prompt begins in the same way and has not run so far yet."""
        return any(
            older.number < row.number
            and older.line.stale == row.line.stale
            and self._shared(older.prompt, row) >= max(row.done + _WORTH_COPYING, older.done + 1)
            for older in self._prefilling
        )

    def _borrow(self, row: Row) -> None:
        """Copy what another line holds of this prompt."""
        line, _ = self._lines.longest(row.prompt)
        shared = self._shared(line.tokens, row)
        if not row.line.stale and shared >= row.done + _WORTH_COPYING:
            self._engine.copy(line.index, row.line.index, row.done, shared)
            row.progress.reused += shared - row.done
            row.reached(shared)

    def _shared(self, tokens: Ids, row: Row) -> int:
        """How many tokens a row's prompt shares with others, its last one left out."""
        return min(common_length(tokens, row.prompt), len(row.prompt) - 1)

    def _run_piece(self, row: Row, count: int) -> None:
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
        rows = [row for row in self._decoding if row.started < row.limit]
        counted = [row for row in rows if row.count_reads and row.started % EVERY == 1]
        if together := [row for row in rows if row not in counted]:
            self._step_rows(together)
        for row in counted:
            self._counted_step(row)
        while self._unread and (len(self._unread) > self._engine.lag or not rows):
            for row, token in self._unread.popleft():
                # another step may have been started before the host saw that the row has ended
                if row.progress.reason is None:
                    with self._ending(row):
                        if (reason := row.take(token)) is not None:
                            self._end(row, reason)

    def _step_rows(self, rows: Sequence[Row]) -> None:
        """One step. If it fails, each row runs by itself, so that only the guilty ones end."""
        try:
            with exclusion.running():
                tokens = self._engine.step(rows)
        except Exception as error:  # whatever a model raises
            if len(rows) == 1:
                self._end(rows[0], "error", error)
                return
            for row in rows:
                self._step_rows([row])
        else:
            self._started(rows, tokens)

    def _counted_step(self, row: Row) -> None:
        with self._ending(row):
            with exclusion.running():
                token, share = self._engine.counted_step(row)
            row.progress.reads.append((row.started + 1, share))
            self._started([row], token)

    def _started(self, rows: Sequence[Row], tokens: Tensor) -> None:
        for row in rows:
            row.start()
        self._unread.append(_Unread(rows, tokens))

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
            _forget_frames(error)
        row.progress.end(reason, error)


def _forget_frames(error: Exception) -> None:
    """Clear the frames that an error holds: a user who keeps it would keep the whole cache."""
    for frame, _ in walk_tb(error.__traceback__):
        for caller, _ in walk_stack(frame):
            with suppress(RuntimeError):  # it still runs
                caller.clear()


class _Unread:
    """The tokens of a step on their way to the host, while later steps run."""

    def __init__(self, rows: Sequence[Row], tokens: Tensor) -> None:
        self._rows = rows
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._tokens = torch.empty_like(tokens, device="cpu", pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tokens = tokens

    def __iter__(self) -> Iterator[tuple[Row, int]]:
        """Each row and its token, when they are there."""
        if self._event is not None:
            self._event.synchronize()
        return zip(self._rows, self._tokens.tolist(), strict=True)
