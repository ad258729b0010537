"""The models that a server offers, each under an id of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from cats.decode import Sessions
from cats.decode.tracing import shadow_of
from cats.errors import CatsError, UnsupportedModelError
from cats.model import CatsActivation, is_sparse
from cats.protocols import CausalModel, Tokenizer
from cats.serving.errors import ApiError
from cats.serving.grammar import Grammars
from cats.serving.prompts import Prompts
from cats.serving.queue import Queue
from cats.serving.tool_format import ToolFormat
from cats.weights import INPUT_THRESHOLD, input_threshold

_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


class ServedModel:
    """A model, its sessions and its queue.

    Attributes:
        id: What requests name it.
        sessions: Decode its answers.
        tokenizer: Of the model.
        prompts: Makes ids of requests.
        grammars: Compiles grammars of requests.
        queue: Its places.
        is_sparse: Whether its MLPs drop neurons.
        ends: Tokens that end an answer.
        vocabulary: Number of its scores.
        defaults: Sampling options where a request leaves them open: those of the model, else
            those of OpenAI's API.
    """

    def __init__(
        self, name: str, sessions: Sessions, model: nn.Module, tokenizer: Tokenizer, *, queue: int
    ) -> None:
        self.id, self.sessions, self.tokenizer = name, sessions, tokenizer
        causal = cast(CausalModel, model)
        self.vocabulary = causal.config.get_text_config(decoder=True).vocab_size
        generation: GenerationConfig = causal.generation_config
        self.ends = _ids(generation.eos_token_id)
        self.is_sparse = is_sparse(model) and not _keeps_all(model)
        self._thresholds = getattr(causal.config, "cats", None) if self.is_sparse else None
        self.prompts = Prompts(tokenizer, context=sessions.context)
        self.grammars = Grammars(tokenizer, vocabulary=self.vocabulary, ends=self.ends)
        self.queue = Queue(rows=sessions.rows if sessions.refusal is None else 1, limit=queue)
        self.defaults: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        if generation.do_sample:
            own = {name: getattr(generation, name, None) for name in _SAMPLING}
            self.defaults |= {name: value for name, value in own.items() if value is not None}
        self._created = int(time.time())

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model's chat template writes tool calls.

        Raises:
            ApiError: If it knows no tools.
        """
        return ToolFormat.of(self.prompts)

    @property
    def is_alive(self) -> bool:
        """Whether its sessions can still be opened."""
        return self.sessions.is_alive

    def describe(self) -> dict[str, Any]:
        """An entry of ``/v1/models``."""
        cats: dict[str, Any] = {
            "sparse": self.is_sparse,
            "rows": self.queue.rows,
            "context": self.sessions.context,
        }
        if self._thresholds is not None:
            cats["method"] = self._thresholds.get("method")
            cats["target_sparsity"] = self._thresholds.get("target_sparsity")
        return {
            "id": self.id,
            "object": "model",
            "created": self._created,
            "owned_by": "cats",
            "max_model_len": self.sessions.context,
            "cats": cats,
        }

    def close(self) -> None:
        self.sessions.close()
        self.prompts.close()


class Models:
    """All models of a server, by id."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = {model.id: model for model in models}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def get(self, name: str) -> ServedModel:
        """
        Raises:
            ApiError: If there is no such model.
        """
        try:
            return self._models[name]
        except KeyError:
            raise ApiError(
                404,
                f"The model `{name[:100]}` does not exist; this server has "
                f"{', '.join(self._models)}",
                code="model_not_found",
                param="model",
            ) from None

    def close(self) -> None:
        """End all sessions, and wait for the running step."""
        for model in self._models.values():
            model.close()


def serve_models(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    name: str,
    rows: int = 16,
    context: int | None = None,
    cache_tokens: int | None = None,
    engine: str = "modules",
    dense_rows: int = 2,
    queue: int = 64,
) -> Models:
    """A model under its name, and a sparse one as ``NAME:dense`` too.

    Args:
        model: On its device, fused if it is sparse.
        tokenizer: Of the model.
        name: Id of the model.
        rows: As for :class:`cats.Sessions`.
        context: As for :class:`cats.Sessions`.
        cache_tokens: As for :class:`cats.Sessions`.
        engine: As for :class:`cats.Sessions`.
        dense_rows: How many answers of the dense model decode together; 0 leaves it out.
        queue: How many answers of each may wait.
    """
    sessions = Sessions(
        model,
        tokenizer=tokenizer,
        rows=rows,
        context=context,
        cache_tokens=cache_tokens,
        engine=engine,
    )
    served = [ServedModel(name, sessions, model, tokenizer, queue=queue)]
    if dense_rows and served[0].is_sparse:
        try:
            dense = dense_copy(model)
            dense_sessions = Sessions(
                dense,
                tokenizer=tokenizer,
                rows=dense_rows,
                context=sessions.context,
                engine=engine,
            )
        except CatsError:
            sessions.close()
            raise
        served.append(ServedModel(f"{name}:dense", dense_sessions, dense, tokenizer, queue=queue))
    return Models(served)


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of a sparse model that drops no neuron and shares all weights.

    It runs the same operators, with thresholds of 0: no absolute value is smaller.

    Raises:
        UnsupportedModelError: If the method of the model changes more than it drops.
    """
    copy = shadow_of(model)
    for module in copy.modules():
        if isinstance(module, CatsActivation) and module.dense is not module.act:
            raise UnsupportedModelError(
                "the dense model cannot be served beside this one, whose method replaces the "
                "activation itself: use --dense-rows 0"
            )
        for name, thresholds in _thresholds(module):
            # not in place: the original has the same tensor
            module._buffers[name] = torch.zeros_like(thresholds)
    return copy


def _thresholds(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The thresholds that a module holds itself: on its neurons, or on its inputs."""
    if isinstance(module, CatsActivation):
        return [("threshold", module.threshold)]
    threshold = input_threshold(module)
    return [] if threshold is None else [(INPUT_THRESHOLD, threshold)]


def _keeps_all(model: nn.Module) -> bool:
    """Whether no neuron can be dropped, as in :func:`dense_copy`."""
    return not any(
        bool(thresholds.any()) for m in model.modules() for _, thresholds in _thresholds(m)
    )


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
