"""Thresholds from text in one call, for every method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from cats.calibration.collection import collect
from cats.calibration.paths import Paths
from cats.calibration.samples import Samples
from cats.config import CatsConfig, check_target
from cats.data import Batch
from cats.errors import ConfigError
from cats.methods import CountedMethod, StagedMethod, get_method
from cats.model.traffic import sparsity_at


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    target_sparsity: float | None = None,
    target_bytes: float | None = None,
    method: str = "cats",
    attention: bool = False,
    exclude: Sequence[str] = (),
    per_expert: bool = False,
) -> CatsConfig:
    """Thresholds that drop ``target_sparsity`` of each MLP's neurons on the given text.

    With ``target_bytes`` instead, a token reads this share of the bytes of the gated MLPs (and of
    attention's projections). Methods with several masks find the best split between them and
    between layers, by forward and backward passes.

    The dense model does not change. For several targets, call :func:`collect` once, and then
    ``config`` of its result for each.

    Args:
        model: A dense Hugging Face model with gated MLPs.
        batches: Token ids ``[B, T]``, or mappings with ``input_ids`` and, where rows are padded,
            ``attention_mask``; padding is not counted. See :func:`cats.data.token_blocks`. Methods
            with several masks take no padding.
        target_sparsity: Share of the neurons to drop, inside (0, 1).
        target_bytes: Share of the bytes to read, inside (0, 1).
        method: A name of :data:`cats.methods.METHODS`.
        attention: Whether inputs of attention's projections are dropped as well.
        exclude: Patterns of module names to leave dense, such as ``"model.layers.0.*"``.
        per_expert: A threshold for each expert of a mixture; by default, the experts of a layer
            share one.

    Raises:
        ConfigError: If the target or the method is wrong, or the target cannot be met.
        UnsupportedModelError: If the model has no gated MLP, or is sparse already, or if a method
            with several masks meets stacked experts.
        DataError: If there are no tokens, if an activation is NaN or infinite, or if an expert
            that needs a threshold got no token.
    """
    check_goals(method, target_sparsity, target_bytes, attention)
    if isinstance(get_method(method), StagedMethod):
        assert target_bytes is not None
        if per_expert:
            raise ConfigError(
                f"method {method!r} has no thresholds per expert: leave out per_expert, or use "
                "method 'cats'"
            )
        samples = Samples.collect(model, batches, exclude=exclude, attention=attention)
        return Paths.search(model, samples, method).config(model, samples, target_bytes)
    if target_bytes is not None:
        target_sparsity = sparsity_at(model, target_bytes, exclude=exclude)
    statistics = collect(model, batches, method=method, exclude=exclude, per_expert=per_expert)
    return statistics.config(target_sparsity)


def check_goals(
    method: str, target_sparsity: float | None, target_bytes: float | None, attention: bool
) -> None:
    """
    Raises:
        ConfigError: If not exactly one target is given, or the method has no such target.
    """
    chosen = get_method(method)
    check_target(target_sparsity)
    check_target(target_bytes, "share of bytes")
    if isinstance(chosen, CountedMethod):
        if attention:
            raise ConfigError(
                f"method {method!r} leaves attention as it is: use one with several masks, such as "
                "cascade"
            )
        given = [t for t in (target_sparsity, target_bytes) if t is not None]
        if not chosen.has_target and given:
            raise ConfigError(f"method {method!r} has no target, got {given[0]:g}")
        if chosen.has_target and len(given) != 1:
            raise ConfigError(
                f"method {method!r} needs target_sparsity, such as 0.5, or else target_bytes"
            )
    elif target_sparsity is not None or target_bytes is None:
        raise ConfigError(
            f"method {method!r} has several masks: it needs target_bytes, such as 0.5 for half of "
            "the bytes, and no target_sparsity"
        )
