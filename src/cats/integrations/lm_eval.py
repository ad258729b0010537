"""The model type ``cats`` of lm-evaluation-harness: a sparse checkpoint, or thresholds beside one.

The harness has no entry point for models: :func:`register`, then call its command in the process.
"""

from __future__ import annotations

from typing import Any

from cats.apply import sparsify_
from cats.checkpoint import locate, read_config
from cats.config import CatsConfig
from cats.errors import ConfigError

NAME = "cats"


def register() -> None:
    """Make ``--model cats --model_args pretrained=MODEL,thresholds=FILE`` known to the harness.

    ``MODEL`` is what :func:`cats.checkpoint.locate` takes. All arguments of the type ``hf`` are
    taken as well; ``thresholds`` is left out where the checkpoint is sparse. Calling it again
    changes nothing.

    Raises:
        ConfigError: If the harness is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry, register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError("the harness is not installed: pip install 'cats-llm[eval]'") from error
    if NAME in model_registry:
        return

    @register_model(NAME)
    class CatsLM(HFLM):  # type: ignore[misc]
        """``hf`` with thresholds."""

        def __init__(
            self, pretrained: str | None = None, thresholds: str | None = None, **kwargs: Any
        ) -> None:
            if pretrained is None:
                raise ConfigError("--model cats needs --model_args pretrained=MODEL")
            self._thresholds = (
                CatsConfig.load(thresholds) if thresholds else read_config(pretrained)
            )
            super().__init__(pretrained=locate(pretrained, **kwargs), **kwargs)

        def _create_model(self, *args: Any, **kwargs: Any) -> None:
            super()._create_model(*args, **kwargs)
            sparsify_(self._model, self._thresholds)


def run(arguments: list[str]) -> None:
    """The harness's own command line, with the model type ``cats``.

    Args:
        arguments: What follows ``lm-eval``.
    """
    import sys

    register()
    from lm_eval.__main__ import cli_evaluate

    kept = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = kept
