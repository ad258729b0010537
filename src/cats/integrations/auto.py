"""Let transformers apply the thresholds of a checkpoint when it loads one.

Its Auto classes, pipelines, PEFT, lm-evaluation-harness and the Trainer all load models by
``PreTrainedModel.from_pretrained``, and save them by ``save_pretrained``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cats.apply import sparsify_
from cats.card import write_card
from cats.checkpoint import hub_options, read_config
from cats.integrations.experts import OPERATOR, experts_forward
from cats.model import is_sparse

# Thresholds are no weights of the model: transformers would report them as unexpected.
_THRESHOLDS = r"\.(threshold|product_threshold|input_threshold)$"


def register() -> None:
    """Apply thresholds wherever transformers loads a sparse checkpoint, in this process.

    A checkpoint without a ``cats`` block is loaded as before. Sparse models are saved with a model
    card. The experts implementation ``cats`` can be chosen (:mod:`cats.integrations.experts`).
    Calling this again changes nothing; :func:`unregister` undoes it.

    Example:
        >>> cats.register()
        >>> model = AutoModelForCausalLM.from_pretrained("my-sparse-model")
    """
    if _is_ours(PreTrainedModel.from_pretrained):
        return
    ALL_EXPERTS_FUNCTIONS.register(OPERATOR, experts_forward)
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    save = PreTrainedModel.save_pretrained

    @functools.wraps(load)
    def from_pretrained(
        cls: type[Any], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        path = pretrained_model_name_or_path
        with _thresholds_expected(cls):
            loaded = load(cls, path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if path is not None and getattr(model.config, "cats", None) and not is_sparse(model):
            sparsify_(
                model, read_config(path, variant=kwargs.get("variant"), **hub_options(kwargs))
            )
        return loaded

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        is_main = kwargs.get("is_main_process", args[0] if args else True)
        result = save(self, save_directory, *args, **kwargs)
        block = getattr(self.config, "cats", None)
        if block and is_main and is_sparse(self):
            write_card(save_directory, block, base=self.config.name_or_path)
        return result

    vars(from_pretrained)["_of_cats"] = vars(save_pretrained)["_of_cats"] = True
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def unregister() -> None:
    """Undo :func:`register`; models that are loaded stay as they are."""
    type(ALL_EXPERTS_FUNCTIONS)._global_mapping.pop(OPERATOR, None)
    for name in ("from_pretrained", "save_pretrained"):
        function = vars(PreTrainedModel)[name]
        if _is_ours(function):
            plain = getattr(function, "__func__", function).__wrapped__
            is_class_method = isinstance(function, classmethod)
            setattr(PreTrainedModel, name, classmethod(plain) if is_class_method else plain)


def _is_ours(function: Any) -> bool:
    return hasattr(getattr(function, "__func__", function), "_of_cats")


@contextmanager
def _thresholds_expected(cls: type[Any]) -> Iterator[None]:
    """Within the block, transformers does not report thresholds of a checkpoint as unexpected."""
    name = "_keys_to_ignore_on_load_unexpected"
    before, own = getattr(cls, name, None), name in vars(cls)
    setattr(cls, name, [*(before or []), _THRESHOLDS])
    try:
        yield
    finally:
        if own:
            setattr(cls, name, before)
        else:
            delattr(cls, name)
