"""What errors hold of the frames that raised them."""

from __future__ import annotations

from contextlib import suppress
from traceback import walk_stack, walk_tb


def forget_frames(error: BaseException) -> None:
    """Clear the frames that an error holds: a user who keeps it would keep the whole cache."""
    seen: set[int] = set()
    errors = [error]
    while errors:
        # what it was raised from has frames of its own
        current = errors.pop()
        seen.add(id(current))
        for frame, _ in walk_tb(current.__traceback__):
            for caller, _ in walk_stack(frame):
                with suppress(RuntimeError):  # it still runs
                    caller.clear()
        before = (current.__cause__, current.__context__)
        errors += [e for e in before if e is not None and id(e) not in seen]
