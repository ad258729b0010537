"""``cats profile``: how many activations of a model are zero or near zero."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cats.cli import options

# Rows per batch: a profile counts unions of up to eight rows.
_BATCH = 8


def profile(
    model: options.Model,
    text: Annotated[
        Path | None,
        typer.Argument(
            metavar="TEXT", help="UTF-8 text file, .gz too.", show_default="the sample text"
        ),
    ] = None,
    thresholds: options.Thresholds = None,
    tokens: Annotated[
        int | None,
        options.number(
            min=2,
            help="Use at most N tokens, in whole blocks.",
            show_default="20000",
        ),
    ] = None,
    block: options.Block = 128,
    bos: options.Bos = None,
    near: Annotated[
        float,
        typer.Option(min=0, metavar="X", help="Magnitude below which an activation is near zero."),
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
    """Measure the share of activations that are zero or near zero.

    Example: [b]cats profile smollm2 wiki.txt --thresholds cats50.safetensors[/b]

    Models with ungated MLPs, such as OPT and GPT-2, work too.
    """
    import dataclasses

    from cats.cli.tables import activation_table
    from cats.data import text_start, token_blocks
    from cats.evaluation.profile import profile as measure

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
    measured = measure(loaded, batches, near=near)
    about = {
        "model": model,
        "text": options.describe_texts([text] if text else None),
        "block": block,
        "bos": bool(text_start(tokenizer, bos)),
        "cats": getattr(loaded.config, "cats", None),
    }
    if output is not None:
        measured.save(output, **about)
    if as_json:
        options.print_json({**about, **dataclasses.asdict(measured)})
        return
    title = f"{model} on {measured.tokens:,} tokens of {about['text']}"
    options.out.print(activation_table(title, measured).rich())
    shares = ", ".join(f"{value:.1%} ({name})" for name, value in measured.by_token.items())
    options.out.print(f"share of zeros of a token, quantiles over the tokens: {shares}")
    for kind, read in measured.read.items():
        of_rows = ", ".join(f"{share:.1%} ({rows})" for rows, share in read.items())
        options.out.print(f"{kind} that are read, by rows that are decoded together: {of_rows}")
