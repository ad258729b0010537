"""Sessions one after the other, where rows of different lengths cannot run together."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import nn

from cats.decode.rows.inbox import Inbox
from cats.decode.rows.row import Ticket
from cats.decode.session import Session
from cats.decode.turns import Turns
from cats.protocols import CausalModel


class OneByOne:
    """Runs each session to its end, as :class:`cats.Decoder` does, before the next one."""

    def __init__(self, model: nn.Module, inbox: Inbox) -> None:
        config = cast(CausalModel, model).config.get_text_config(decoder=True)
        self._session = Session(model, config, "auto")
        self._turns = Turns()
        self._inbox = inbox
        self._waiting: list[Ticket] = []
        self._open = True

    def run(self) -> None:
        """Serve until the inbox is closed; this is all that a thread does."""
        failure: BaseException | None = None
        try:
            while self._open:
                if self._waiting:
                    self._answer(self._waiting.pop(0))
                self._take_new(block=not self._waiting)
        except BaseException as error:  # all sessions raise it, and so does the next open()
            failure = error
        self._inbox.end(failure)
        for ticket in self._waiting:
            ticket.progress.end("cancelled", failure)
        self._session.close()

    def _take_new(self, *, block: bool) -> None:
        """Take in new sessions, and end those that were cancelled."""
        if not self._open:
            return
        new = self._inbox.take(block=block)
        self._open = new is not None
        self._waiting += new or ()
        for ticket in [t for t in self._waiting if t.progress.cancelled]:
            self._waiting.remove(ticket)
            ticket.progress.end("cancelled")

    def _answer(self, ticket: Ticket) -> None:
        progress = ticket.progress
        options = replace(ticket.request.options, seed=ticket.seed)
        request = replace(ticket.request, options=options)
        try:
            with self._turns.take() as turn:
                for tokens in self._session.answer(request, turn):
                    progress.add(int(tokens[0]))
                    self._take_new(block=False)
                    if progress.cancelled or not self._open:
                        break
            cancelled = progress.cancelled or not self._open
            progress.end("cancelled" if cancelled else self._session.reasons[0])
        except Exception as error:  # options, the user's own code, or the model
            progress.end("error", error)
        except BaseException as error:
            progress.end("error", error)
            raise
