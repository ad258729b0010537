"""``cats generate``: continue a prompt."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

from cats.cli import options


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    thresholds: options.Thresholds = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="0 takes the likeliest token.", rich_help_panel="Sampling"),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Draw from so many tokens; 0: all. Default: as the model says, else 50.",
            rich_help_panel="Sampling",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the likeliest that reach this sum. Default: as the model says.",
            rich_help_panel="Sampling",
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Least share of the likeliest's probability. Default: as the model says.",
            rich_help_panel="Sampling",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1 avoids repetition. Default: as the model says.",
            rich_help_panel="Sampling",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends it; repeatable.", rich_help_panel="Sampling"),
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="Wrap the prompt in the model's chat template, if it has one.")
    ] = True,
    engine: Annotated[str, typer.Option(help="auto, eager, compiled or stream.")] = "auto",
    fuse: Annotated[bool, typer.Option(help="Run a sparse model's MLPs as one operator.")] = True,
    seed: Annotated[
        int,
        typer.Option(help="Of the draw, at a temperature above 0.", rich_help_panel="Sampling"),
    ] = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Continue a prompt, token by token.

    Example: [b]cats generate smollm2 "Why is the sky blue?" --thresholds cats50.safetensors[/b]
    """
    loaded, tokenizer = options.load(
        model,
        thresholds=thresholds,
        dtype=dtype,
        device=device,
        threads=threads,
        hub=options.hub(revision, subfolder, trust_remote_code),
    )
    from cats.fusion import fuse_
    from cats.model import is_sparse
    from cats.recipes.generation import answer

    if fuse and is_sparse(loaded):
        fuse_(loaded)
    given: dict[str, Any] = {
        "do_sample": temperature > 0,
        "temperature": temperature or None,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop_strings": stop or None,
    }
    found = answer(
        loaded,
        tokenizer,
        prompt,
        chat=chat,
        engine=engine,
        max_new_tokens=max_new_tokens,
        on_text=None if as_json else partial(print, end="", flush=True),
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    if as_json:
        options.print_json({"model": model, "prompt": prompt, **asdict(found)})
    else:
        print()
        options.err.print(
            f"{found.new_tokens} tokens, {found.tokens_per_second:.1f} tokens/s ({found.engine})",
            style="dim",
        )
