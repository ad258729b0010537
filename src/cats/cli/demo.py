"""``cats demo``: all of CATS on a real model, in a few minutes on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cats.cli import options
from cats.cli.running import Terminal

if TYPE_CHECKING:
    from cats.recipes import Demonstration


def demo(
    sparsity: Annotated[float, typer.Option(help="Target sparsity, inside (0, 1).")] = 0.5,
    text: options.Texts = None,
    tokens: Annotated[
        int, options.number(min=1, help="Use at most N calibration tokens.")
    ] = 10_240,
    eval_tokens: Annotated[
        int, options.number(min=2, help="Use at most N held-out tokens.")
    ] = 8_000,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Prompt of both models.")] = (
        "Explain in two sentences why the sky is blue."
    ),
    max_new_tokens: Annotated[int, options.number(min=2, help="Generate at most N tokens.")] = 64,
    seed: options.Seed = 0,
    bos: options.Bos = None,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A folder, a Hugging Face id, or smollm2.")
    ] = "smollm2",
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for the results as JSON, and for a page of them, report.html.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Calibrate a small model, and compare dense and sparse: quality, text, speed.

    Example: [b]cats demo --sparsity 0.7 --prompt "What is a cat?"[/b]
    """
    from cats.config import check_target
    from cats.recipes.demonstration import BLOCK, demonstrate

    check_target(sparsity)
    options.check_tokens(tokens, BLOCK)
    options.check_tokens(eval_tokens, BLOCK, "--eval-tokens")
    if output is not None:
        options.check_output(output / "report.html")
        _check_plots()
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, tokenizer = options.load(
        model, dtype=dtype, device=device, dense=True, hub=hub, threads=threads
    )
    demonstration = demonstrate(
        loaded,
        tokenizer,
        options.texts_or_sample(text),
        prompt=prompt,
        target_sparsity=sparsity,
        tokens=tokens,
        held_out_tokens=eval_tokens,
        max_new_tokens=max_new_tokens,
        seed=seed,
        bos=bos,
        profiled=output is not None,
        model_name=model,
        text_name=options.describe_texts(text),
        progress=Terminal(),
    )
    page = None if output is None else demonstration.save(output)
    if as_json:
        options.print_json(demonstration.to_dict())
    else:
        _print(demonstration)
        if page is not None:
            options.out.print(f"wrote {page}", markup=False)


def _check_plots() -> None:
    from importlib.util import find_spec

    from cats.errors import DataError

    if find_spec("matplotlib") is None:
        raise DataError("a report needs matplotlib: pip install 'cats-llm[report]'")


def _print(demonstration: Demonstration) -> None:
    from rich.markup import escape
    from rich.panel import Panel

    from cats.cli.tables import layer_table, speed_table
    from cats.config import label_of
    from cats.report import Material

    name = label_of("cats", demonstration.target_sparsity)
    out = options.out
    out.print(layer_table(demonstration.thresholds, demonstration.realized_sparsity).rich())
    out.print(f"[b]{escape(demonstration.prompt)}[/b]")
    for label, side in (("dense", demonstration.dense), (name, demonstration.cats)):
        out.print(Panel(escape(side.answer.text.strip()), title=label, title_align="left"))
    out.print(speed_table(demonstration).rich())
    for tradeoff in Material(results=demonstration.results()).tradeoffs():
        out.print(f"[b]{escape(tradeoff.sentence())}[/b]", highlight=False)
    cats = demonstration.cats
    out.print(
        "transformers: model.generate. cats: cats.generate with the engine "
        f"{cats.answer.engine}; {name} runs with fused MLPs there. Each speed is the median "
        f"of {len(cats.rounds)} runs in turns.",
        style="dim",
    )
    out.print(
        f"Calibrated on {demonstration.calibration_tokens:,} tokens and measured on "
        f"{demonstration.held_out_tokens:,} held-out tokens of {demonstration.text}, "
        f"seed {demonstration.seed}.",
        style="dim",
        markup=False,
    )
