"""``cats profile``: what the activations of a model look like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cats.cli import options

if TYPE_CHECKING:
    from cats.evaluation.profile import Profile
    from cats.report.tables import Table

# Rows of a batch: unions over up to eight tokens are measured.
_BATCH = 8


def profile(
    model: options.Model,
    text: Annotated[
        Path | None,
        typer.Argument(help="UTF-8 text file, .gz too.", show_default="the sample that ships"),
    ] = None,
    thresholds: options.Thresholds = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Look at no more than so many, in whole blocks.", show_default="20000"
        ),
    ] = None,
    block: options.Block = 128,
    bos: options.Bos = None,
    near: Annotated[
        float, typer.Option(min=0, help="Magnitude below which an activation is near zero.")
    ] = 0.1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write JSON for [b]cats report[/b].")
    ] = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Share of activations that are zero or near zero, and how tokens share them.

    Example: [b]cats profile smollm2 wiki.txt --thresholds cats50.safetensors[/b]

    Models with ungated MLPs, such as OPT and GPT-2, are taken too.
    """
    import dataclasses

    from cats.data import text_start, token_blocks
    from cats.evaluation import profile as profiles

    options.check_output(output)
    tokens = options.tokens_or_default(tokens, 20_000, block)
    loaded, tokenizer = options.load(
        model,
        thresholds=thresholds,
        dtype=dtype,
        device=device,
        threads=threads,
        hub=options.hub(revision, subfolder, trust_remote_code),
    )
    texts = options.texts_or_sample([text] if text else None)
    blocks = token_blocks(tokenizer, texts, length=block, limit=tokens // block, bos=bos)
    batches = options.progress(blocks.split(_BATCH), "profiling")
    found = profiles.profile(loaded, batches, near=near)
    about = {
        "model": model,
        "text": options.describe_texts([text] if text else None),
        "block": block,
        "bos": bool(text_start(tokenizer, bos)),
        "cats": getattr(loaded.config, "cats", None),
    }
    if output is not None:
        found.save(output, **about)
    if as_json:
        options.print_json({**about, **dataclasses.asdict(found)})
        return
    title = f"{model} on {found.tokens:,} tokens of {about['text']}"
    options.out.print(table(title, found).rich())
    shares = ", ".join(f"{value:.1%} ({name})" for name, value in found.by_token.items())
    options.out.print(f"share of zeros of a token, quantiles over the tokens: {shares}")


def table(title: str, found: Profile) -> Table:
    """One row per activation module."""
    from cats.report.tables import Table, cell

    unions = sorted({n for layer in found.layers for n in layer.union})
    return Table(
        title=title,
        columns=("MLP", "zero", f"< {found.near:g}", *(f"by {n}" for n in unions), "again"),
        rows=[
            [
                layer.name.rpartition(".")[0],
                f"{layer.zero:.1%}",
                f"{layer.near_zero:.1%}",
                *(cell(layer.union.get(n), ".1%") for n in unions),
                cell(layer.overlap, ".1%"),
            ]
            for layer in found.layers
        ],
        wrap=True,
        caption="by 2, 4, 8: zero for all of so many tokens of different texts; again: share of "
        "the neurons that are not zero which were not for the token before either",
    )
