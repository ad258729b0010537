"""Quantise a model, and measure what that costs on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from cats.errors import ConfigError
from cats.formats import store_packed_
from cats.metrics import perplexity
from cats.model.traffic import token_bytes, weight_bytes
from cats.protocols import CausalModel
from cats.quantisation import check_bits, decoder_layers, gptq_, quantise_, select
from cats.quantisation.rounding import round_head_
from cats.quantisation.selection import HEAD_BITS
from cats.recipes.progress import Progress
from cats.undo import unchanged_on_error
from cats.weights import are_tied

METHODS = ("rtn", "gptq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A model as it is, or after some of its layers are quantised.

    Attributes:
        name: ``"before"``, ``"layers"`` or ``"head"``.
        layers: Number of layers that this step quantises.
        kind: How, such as ``"int4, groups of 128"``; before, the dtype.
        bytes: Of all weights of the model after it.
        token_bytes: Of the weights that a token reads.
        perplexity: On the held-out blocks; None without such.
    """

    name: str
    layers: int
    kind: str
    bytes: int
    token_bytes: int
    perplexity: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantisation:
    """How a model was quantised, and what that costs.

    Attributes:
        method: ``"rtn"`` or ``"gptq"``.
        bits: Of the layers.
        group_size: Columns that share a scale; None for a scale per row.
        ignored: Linear layers that stay as they were.
        calibration_tokens: Tokens that GPTQ saw; 0 for ``"rtn"``.
        held_out_tokens: Tokens of the perplexities.
        steps: The model before, after its layers, and after its head where that is quantised.
    """

    method: str
    bits: int
    group_size: int | None
    ignored: tuple[str, ...]
    calibration_tokens: int
    held_out_tokens: int
    steps: tuple[Step, ...]


def quantise(
    model: nn.Module,
    blocks: Tensor | None = None,
    held_out: Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    method: str | None = None,
    head: bool = False,
    exclude: Sequence[str] = (),
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Quantisation:
    """Quantise the decoder's linear layers, and compare with the model before on held-out blocks.

    ``model.save_pretrained`` then writes an ordinary compressed-tensors checkpoint. A call that
    fails leaves the model as it was.

    Args:
        model: A dense model with ordinary weights; changed in place.
        blocks: Token ids ``[N, T]`` that GPTQ calibrates on, such as :func:`cats.recipes.split`
            gives.
        held_out: Token ids ``[N, T]`` to measure on; None measures nothing.
        bits: 4 or 8.
        group_size: Columns that share a scale; -1 for a scale per row. None: 128 in 4 bits, a row
            in 8. Where a width is no multiple, 64 or 32 are taken instead, and this is said.
        method: ``"rtn"`` rounds to the nearest code, ``"gptq"`` lets the columns that are left
            make up for it. None: GPTQ where there are blocks.
        head: Whether the output head is rounded to 8 bits; one that is the embedding becomes a
            matrix of its own.
        exclude: Patterns of linear layers that stay, such as ``"model.layers.0.*"``.
        batch_size: Blocks per forward pass of the perplexities.
        progress: Shows layers and passes.

    Raises:
        ConfigError: If the options contradict each other or do not fit the model.
        UnsupportedModelError: If the model is quantised, sparse or fused, or has other layers.
    """
    progress = progress or Progress()
    asked = check_bits(bits, group_size)
    method = check_method(method, has_blocks=blocks is not None)
    selection = select(model, bits=bits, group_size=group_size, head=head, exclude=exclude)
    size = selection.group_size
    if size != asked:
        progress.say(f"groups of {size} columns, because a width is no multiple of {asked}")
    if selection.head is not None and _is_tied(model):
        progress.say(
            "the output head is the embedding: it becomes a matrix in 8 bits of its own, and the "
            "embedding stays as it is"
        )

    def step(name: str, layers: int, kind: str) -> Step:
        measured = None
        if held_out is not None:
            text = {"before": "perplexity before", "layers": "perplexity after"}.get(name, name)
            measured = perplexity(model, progress.track(held_out.split(batch_size), text))
        return Step(
            name=name,
            layers=layers,
            kind=kind,
            bytes=weight_bytes(model),
            token_bytes=round(token_bytes(model)),
            perplexity=measured,
        )

    dtype = str(next(iter(selection.layers.values())).weight.dtype).removeprefix("torch.")
    with unchanged_on_error(model):
        steps = [step("before", 0, dtype)]
        # the size that fits is given on, so that it is chosen once
        given = -1 if size is None else size
        if method == "rtn":
            quantise_(model, bits=bits, group_size=given, exclude=tuple(exclude))
        else:
            assert blocks is not None
            with progress.count("GPTQ, layers", len(decoder_layers(model)[1])) as advance:
                gptq_(model, blocks, bits=bits, group_size=given, exclude=exclude, on_layer=advance)
        scaling = "a scale per row" if size is None else f"groups of {size}"
        steps.append(step("layers", len(selection.layers), f"int{bits}, {scaling}"))
        if selection.head is not None:
            round_head_(model, selection.head)
            steps.append(step("head", 1, f"int{HEAD_BITS}, a scale per row"))
        store_packed_(model)
    return Quantisation(
        method=method,
        bits=bits,
        group_size=size,
        ignored=tuple(name for name, m in model.named_modules() if isinstance(m, nn.Linear)),
        calibration_tokens=0 if method == "rtn" or blocks is None else blocks.numel(),
        held_out_tokens=0 if held_out is None else held_out.numel(),
        steps=tuple(steps),
    )


def _is_tied(model: nn.Module) -> bool:
    causal_model = cast(CausalModel, model)
    return are_tied(causal_model.get_input_embeddings(), causal_model.get_output_embeddings())


def check_method(method: str | None, *, has_blocks: bool) -> str:
    """The method, where None is GPTQ if there are blocks.

    Raises:
        ConfigError: If it is unknown, or needs blocks.
    """
    if method is None:
        return "gptq" if has_blocks else "rtn"
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method == "gptq" and not has_blocks:
        raise ConfigError("gptq needs text to calibrate on: give blocks, or the method rtn")
    return method
