"""``cats evaluate``: the quality of a model, dense and sparse."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cats.cli import options


def evaluate(
    model: options.Model,
    thresholds: options.Thresholds = None,
    text: options.Texts = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Evaluate on at most so many.", show_default="all")
    ] = None,
    block: options.Block = 512,
    batch_size: options.BatchSize = 4,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Perplexity of a model, and of its sparse form beside it.

    Example: [b]cats evaluate smollm2 --thresholds cats50.safetensors --text wiki.txt[/b]
    """
    loaded, tokenizer = options.load(model, thresholds=thresholds, dtype=dtype, device=device)
    from cats.data import token_blocks

    limit = None if tokens is None else max(1, tokens // block)
    blocks = token_blocks(tokenizer, options.texts_or_sample(text), length=block, limit=limit)
    report = {"model": model, "text": options.describe_texts(text), "tokens": blocks.numel()}
    report |= _measure(loaded, blocks.split(batch_size))
    if as_json:
        options.print_json(report)
    else:
        _print(report)


def _measure(model: Any, batches: Any) -> dict[str, Any]:
    from cats.apply import densify_
    from cats.metrics import perplexity, perplexity_and_sparsity

    report: dict[str, Any] = {}
    if hasattr(model.config, "cats"):
        report["method"] = model.config.cats["method"]
        report["target_sparsity"] = model.config.cats["target_sparsity"]
        report["perplexity_sparse"], report["realized_sparsity"] = perplexity_and_sparsity(
            model, options.progress(batches, "sparse perplexity")
        )
        densify_(model)
    report["perplexity_dense"] = perplexity(model, options.progress(batches, "dense perplexity"))
    return report


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from cats.cli.tables import loss

    table = Table(
        title=f"{report['model']} on {report['tokens']:,} tokens of {report['text']}",
        title_justify="left",
    )
    table.add_column("model")
    table.add_column("realised sparsity", justify="right")
    table.add_column("perplexity", justify="right")
    table.add_column("change", justify="right")
    dense = report["perplexity_dense"]
    table.add_row("dense", "", f"{dense:.3f}", "")
    if "perplexity_sparse" in report:
        realized, sparse = report["realized_sparsity"].values(), report["perplexity_sparse"]
        target = report["target_sparsity"]
        table.add_row(
            report["method"] + ("" if target is None else f"-{target * 100:g}"),
            f"{sum(realized) / len(realized):.1%}",
            f"{sparse:.3f}",
            loss(dense, sparse),
        )
    options.out.print(table)
