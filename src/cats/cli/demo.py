"""``cats demo``: all of CATS on a real model, in a few minutes on a CPU."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from cats.cli import options
from cats.cli.running import Terminal

if TYPE_CHECKING:
    from cats.recipes import Demonstration


def demo(
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            help="A sparsity of CATS, inside (0, 1); repeatable. The other method reads the same "
            "bytes.",
            show_default="0.5, 0.7",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="The method to compare with CATS: one with several masks.")
    ] = "cascade",
    text: options.Texts = None,
    tokens: Annotated[int, options.number(min=1, help="Use at most N calibration tokens.")] = 8_192,
    eval_tokens: Annotated[
        int, options.number(min=2, help="Use at most N held-out tokens.")
    ] = 6_144,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Prompt of all models.")] = (
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

    Example: [b]cats demo --sparsity 0.6 --prompt "What is a cat?"[/b]
    """
    from cats.calibration.paths import staged_method
    from cats.config import check_target
    from cats.recipes.demonstration import BLOCK, demonstrate

    sparsities = sparsity or (0.5, 0.7)
    for target in sparsities:
        check_target(target)
    staged_method(method)
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
        sparsities=sparsities,
        method=method,
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

    from cats.cli.tables import speed_table
    from cats.report import Material

    out = options.out
    out.print(f"[b]{escape(demonstration.prompt)}[/b]")
    for label, side in demonstration.sides.items():
        out.print(Panel(escape(side.answer.text.strip()), title=label, title_align="left"))
    out.print(speed_table(demonstration).rich())
    for tradeoff in Material(results=demonstration.results()).tradeoffs():
        out.print(f"[b]{escape(tradeoff.sentence())}[/b]", highlight=False)
    dense = demonstration.dense
    out.print(
        f"Speeds: cats.generate with the engine {dense.answer.engine}, sparse models with fused "
        f"MLPs; each is the median of {len(dense.rounds)} runs in turns. model.generate of "
        f"transformers gives {median(dense.transformers_rounds):.1f} tokens per second, dense.",
        style="dim",
    )
    out.print(
        f"Calibrated on {demonstration.calibration_tokens:,} tokens and measured on "
        f"{demonstration.held_out_tokens:,} held-out tokens of {demonstration.text}, "
        f"seed {demonstration.seed}.",
        style="dim",
        markup=False,
    )
