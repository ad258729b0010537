"""Sessions one after the other, where rows of different lengths cannot run together."""

from __future__ import annotations

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

    def run(self) -> None:
        """Serve until the inbox is closed; this is all that a thread does."""
        waiting: list[Ticket] = []
        while (new := self._inbox.take(block=not waiting)) is not None:
            waiting += new
            self._answer(waiting.pop(0))
        self._inbox.end()
        for ticket in waiting:
            ticket.progress.end("cancelled")
        self._session.close()

    def _answer(self, ticket: Ticket) -> None:
        progress = ticket.progress
        if progress.cancelled:
            progress.end("cancelled")
            return
        try:
            with self._turns.take() as turn:
                for tokens in self._session.answer(ticket.request, turn):
                    progress.add(int(tokens[0]))
                    if progress.cancelled:
                        break
            progress.end("cancelled" if progress.cancelled else self._session.reasons[0])
        except Exception as error:  # options, the user's own code, or the model
            progress.end("error", error)
