"""Changes of a model between two sessions."""

from __future__ import annotations

from typing import Literal
from weakref import ref

from torch import nn

from cats.decode.marks import Marks, hides_settings
from cats.decode.runner import Runner, runner_of

# The engine whose marks say when a model has changed.
ENGINE = "eager"
# Of numbers: keys and values of earlier texts are of no use. Of modules, hooks or settings: what
# was made for the model is of no use either.
Change = Literal["content", "structure"]


class Watch:
    """Sees changes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._runner: ref[Runner] | None = None
        self._marks: Marks | None = None

    def change(self) -> Change | None:
        """What has changed since the last call, or None.

        Raises:
            UnsupportedModelError: If the model can no longer be decoded.
        """
        runner, marks = runner_of(self._model, ENGINE)
        old_runner, old_marks = self._runner, self._marks
        self._runner, self._marks = ref(runner), marks
        if old_runner is None or old_marks is None or old_runner() is not runner:
            return "structure"
        # hooks may depend on what has no mark
        if old_marks.content != marks.content or hides_settings(self._model):
            return "content"
        return None
