"""``cats demo``: the whole of CATS on a real model, in a few minutes on a CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cats.cli import options


def demo(
    sparsity: Annotated[float, typer.Option(help="Target sparsity, inside (0, 1).")] = 0.5,
    text: options.Texts = None,
    tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens.")] = 20_000,
    eval_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens.")] = 8_000,
    prompt: Annotated[str, typer.Option(help="What both models answer.")] = (
        "Explain in two sentences why the sky is blue."
    ),
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    seed: options.Seed = 0,
    model: Annotated[
        str, typer.Option(help="Another model: a folder or Hugging Face id.")
    ] = "smollm2",
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Calibrate SmolLM2-135M-Instruct, and compare dense and sparse: quality, text, speed.

    Example: [b]cats demo --sparsity 0.7 --prompt "What is a cat?"[/b]
    """
    from cats.config import check_target

    check_target(sparsity)
    loaded, tokenizer = options.load(model, dtype=dtype, device=device, dense=True)
    report = _run(
        loaded, tokenizer, sparsity, text, tokens, eval_tokens, prompt, max_new_tokens, seed
    )
    if as_json:
        options.print_json(report)
    else:
        _print(report, text)


def _run(
    model: Any,
    tokenizer: Any,
    sparsity: float,
    text: list[Path] | None,
    tokens: int,
    eval_tokens: int,
    prompt: str,
    max_new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    from cats.apply import sparsify_
    from cats.calibration import calibrate
    from cats.cli.calibrate import split
    from cats.fusion import fuse_
    from cats.metrics import perplexity, perplexity_and_sparsity

    blocks, held_out = (
        part.split(4) for part in split(tokenizer, text, None, 512, tokens, eval_tokens, seed)
    )
    config = calibrate(model, options.progress(blocks, "calibrating"), target_sparsity=sparsity)
    answer = partial(_answer, model, tokenizer, prompt, max_new_tokens)
    dense = {
        "perplexity": perplexity(model, options.progress(held_out, "dense perplexity")),
        "transformers_tokens_per_second": _plain_speed(model, tokenizer, prompt, max_new_tokens),
        **answer("dense answer"),
    }
    sparsify_(model, config)
    sparse_perplexity, realized = perplexity_and_sparsity(
        model, options.progress(held_out, "CATS perplexity")
    )
    plain = _plain_speed(model, tokenizer, prompt, max_new_tokens)
    fuse_(model)
    sparse = {
        "perplexity": sparse_perplexity,
        "transformers_tokens_per_second": plain,
        **answer("CATS answer"),
    }
    return {
        "seed": seed,
        "target_sparsity": sparsity,
        "calibration_tokens": config.calibration_tokens,
        "calibration_hash": config.calibration_hash,
        "held_out_tokens": sum(b.numel() for b in held_out),
        "thresholds": {name: float(t) for name, t in config.thresholds.items()},
        "realized_sparsity": realized,
        "prompt": prompt,
        "dense": dense,
        "cats": sparse,
    }


def _answer(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, label: str
) -> dict[str, Any]:
    from cats.cli.generate import run

    with options.counter(label, max_new_tokens) as advance:
        return run(
            model, tokenizer, prompt, max_new_tokens=max_new_tokens, do_sample=False,
            callback=lambda tokens: advance(),
        )  # fmt: skip


def _plain_speed(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> float:
    """Tokens a second of ``model.generate``, without the pass over the prompt."""
    from cats.benchmarks.decode_runs import run_transformers
    from cats.cli.generate import encode, tokens_per_second

    run = run_transformers(
        model,
        encode(tokenizer, prompt, chat=True).to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return tokens_per_second(run.times)


def _print(report: dict[str, Any], text: list[Path] | None) -> None:
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table

    from cats.cli.tables import layer_table, loss

    dense, sparse = report["dense"], report["cats"]
    name = f"CATS-{report['target_sparsity'] * 100:g}"
    out = options.out
    out.print(layer_table(report["thresholds"], report["realized_sparsity"]))
    out.print(Panel(escape(dense["text"]), title="dense", title_align="left"))
    out.print(Panel(escape(sparse["text"]), title=name, title_align="left"))
    table = Table(title=escape(report["prompt"]), title_justify="left")
    table.add_column("model")
    table.add_column("held-out perplexity", justify="right")
    table.add_column("change", justify="right")
    table.add_column("tokens/s, transformers", justify="right")
    table.add_column("tokens/s, cats", justify="right")
    change = loss(dense["perplexity"], sparse["perplexity"])
    for label, row, lost in (("dense", dense, ""), (name, sparse, change)):
        table.add_row(
            label,
            f"{row['perplexity']:.2f}",
            lost,
            f"{row['transformers_tokens_per_second']:.1f}",
            f"{row['tokens_per_second']:.1f}",
        )
    out.print(table)
    out.print(
        f"transformers is model.generate; cats is cats.generate, engine {sparse['engine']}, CATS "
        "with fused MLPs",
        style="dim",
    )
    out.print(
        f"calibrated on {report['calibration_tokens']:,} tokens and measured on "
        f"{report['held_out_tokens']:,} held-out tokens of {options.describe_texts(text)}, "
        f"seed {report['seed']}",
        style="dim",
    )
