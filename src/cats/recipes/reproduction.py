"""The paper's whole recipe on one model: quality, activations and speed of every method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cats.errors import ConfigError
from cats.recipes.recipe import Recipe

# What is compared by default; the others have several masks, and their split is searched.
METHODS = ("cats", "relu", "input", "teal")
STAGED = ("neuron", "two-stage", "cascade")


def check_methods(methods: Iterable[str]) -> None:
    """Raise ConfigError for a method that the recipe does not compare."""
    known = (*METHODS, *STAGED)
    if unknown := [name for name in methods if name not in known]:
        raise ConfigError(f"--methods: expected some of {', '.join(known)}, got {unknown[0]!r}")


def reproduce(
    recipe: Recipe,
    *,
    text: str | None = None,
    eval_texts: Mapping[str, str] | None = None,
    eval_tokens: int | None = None,
    methods: Sequence[str] = METHODS,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int | str = "auto",
    data_dir: Path | None = None,
    speed: bool = True,
) -> Path:
    """Run all steps of a recipe; results that are in its folder already are not measured again.

    Args:
        recipe: Model, targets and calibration.
        text: Calibration text; None streams RefinedWeb from the hub.
        eval_texts: Name to text for perplexity, beside held-out calibration text.
        eval_tokens: Largest number of tokens of each such text, in whole blocks; None: all.
        methods: Methods to compare with the dense model, of ``METHODS`` and ``STAGED``.
        tasks: Names; see :func:`cats.evaluation.tasks.task_names`. There may be none.
        limit: Questions per task; None: all.
        batch_size: Questions per forward pass, or ``"auto"``.
        data_dir: Folder of the tasks' parquet files.
        speed: Time one MLP and whole tokens too.

    Returns:
        Path of the report.
    """
    check_methods(methods)
    with recipe.progress.stage() as show:
        show("reading the text")
        blocks, held_out = recipe.split(text)
        recipe.check_folder(blocks, held_out)
        texts = {f"{recipe.source}, held out": held_out}
        texts |= recipe.eval_blocks(eval_texts or {}, eval_tokens)
    variants = list(recipe.variants(blocks, methods))
    for variant in variants:
        for title, evaluated in texts.items():
            recipe.perplexity(variant, title, evaluated)
    recipe.profiles(variants[:2], held_out)
    if tasks:
        recipe.tasks(variants, tasks, limit=limit, batch_size=batch_size, data_dir=data_dir)
    if speed:
        recipe.mlp_times()
        recipe.token_times(held_out)
    return recipe.report()
