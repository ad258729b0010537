"""The model type ``cats`` of lm-evaluation-harness: a sparse model, or a dense one and thresholds.

The harness has no entry point for models. So call :func:`register`, then its command, in the same
process.
"""

from __future__ import annotations

from typing import Any

from cats.apply import sparsify_
from cats.checkpoint import hub_options, load_config, load_tokenizer, locate, read_config
from cats.config import CatsConfig
from cats.errors import ConfigError

NAME = "cats"


def register() -> None:
    """Register ``--model cats --model_args pretrained=MODEL,thresholds=FILE`` in the harness.

    ``MODEL`` is a name for :func:`cats.checkpoint.locate`. All arguments of the type ``hf`` work as
    well. Those that say where files come from (``revision``, ``subfolder``, ``token``,
    ``cache_dir``, ``local_files_only``, ``trust_remote_code``) hold for all files. A sparse
    checkpoint needs no ``thresholds``. Calling this again changes nothing.

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
            self._hub = hub = hub_options(kwargs)
            self._thresholds = (
                CatsConfig.load(thresholds)
                if thresholds
                else read_config(pretrained, variant=kwargs.get("variant"), **hub)
            )
            super().__init__(pretrained=locate(pretrained, **hub), **kwargs)

        # the harness passes all options of the hub to the weights, but only some to these two
        def _get_config(self, pretrained: str, **kwargs: Any) -> None:
            gguf = {n: kwargs[n] for n in ("gguf_file",) if kwargs.get(n) is not None}
            self._config = load_config(pretrained, **gguf, **self._hub)

        def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
            if tokenizer is None or isinstance(tokenizer, str):
                names = ("add_bos_token", "gguf_file")
                options = {n: kwargs[n] for n in names if kwargs.get(n) is not None}
                if "gguf_file" not in options:
                    options["use_fast"] = kwargs.get("use_fast_tokenizer", True)
                tokenizer = load_tokenizer(tokenizer or pretrained, **options, **self._hub)
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)

        def _create_model(self, *args: Any, **kwargs: Any) -> None:
            super()._create_model(*args, **kwargs)
            sparsify_(self._model, self._thresholds)


def run(arguments: list[str]) -> None:
    """The command line of the harness, with the model type ``cats``.

    Args:
        arguments: Those after ``lm-eval``.
    """
    import sys

    register()
    from lm_eval.__main__ import cli_evaluate

    own_argv = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = own_argv
