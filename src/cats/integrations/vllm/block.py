"""What a ``cats`` block says about the MLPs of a model, as far as vLLM has to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cats.config import label_of
from cats.errors import ConfigError, FormatError
from cats.ops.mlp.arguments import ROUTERS
from cats.storage import check_version


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What a method computes in an MLP.

    Attributes:
        router: The branch that is compared with the thresholds, ``"gate"`` or ``"up"``.
        activation: The activation that replaces the model's own, or None.
        tensors: Names of the tensors that it stores per MLP.
    """

    router: str = "gate"
    activation: str | None = None
    tensors: tuple[str, ...] = ("threshold",)


# A method that is missing here is refused: a model without a part of it would be another model.
FORMS = {"cats": Form(), "relu": Form(activation="relu")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsity:
    """How a checkpoint is sparse.

    Attributes:
        label: Method and target, such as ``"cats-50"``.
        form: What the method computes.
        mlps: Names of MLPs that must have thresholds; the checkpoint may hold more.
    """

    label: str
    form: Form
    mlps: frozenset[str]

    @classmethod
    def of(cls, block: Mapping[str, Any], source: str) -> Sparsity:
        """
        Args:
            block: The ``cats`` block of ``config.json``.
            source: Name of the checkpoint, for messages.

        Raises:
            FormatError: If the block is from a newer release, or lacks a field.
            ConfigError: If it has a method or a router that the plugin does not know.
        """
        check_version(block, source)
        try:
            method, router = block["method"], block["router"]
            target, realized = block["target_sparsity"], block["realized_sparsity"]
        except KeyError as error:
            raise FormatError(f"{source}: its cats block lacks {error}") from error
        if method not in FORMS:
            raise ConfigError(
                f"{source}: sparse by the method {method!r}, and this release runs "
                f"{', '.join(FORMS)} in vLLM: upgrade with pip install -U cats-llm, or take the "
                "thresholds off with cats.densify_ and save the model again"
            )
        form = FORMS[method]
        if router != form.router:
            raise ConfigError(
                f"{source}: its cats block compares {router!r}, the method {method!r} compares "
                f"{form.router!r} (there are {', '.join(ROUTERS)}): it comes from a newer release "
                "or another program"
            )
        return cls(label=label_of(method, target), form=form, mlps=frozenset(realized))
