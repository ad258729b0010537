"""``cats generate``: continue a prompt."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

from cats.cli import options

sampling_option = partial(typer.Option, rich_help_panel="Sampling")


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue or to answer.")],
    thresholds: options.Thresholds = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 128,
    temperature: Annotated[
        float,
        sampling_option(min=0.0, metavar="X", help="0 takes the most probable token."),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        sampling_option(
            min=0,
            metavar="N",
            help="Draw from this number of tokens; 0: all. Default: as the model says, else 50.",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        sampling_option(
            help="Draw from the most probable tokens whose sum is this. Default: as the model says."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        sampling_option(
            help="Least probability, as a share of the largest one. Default: as the model says."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        sampling_option(help="Above 1 avoids repetition. Default: as the model says."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        sampling_option(help="Text that ends the answer; repeatable.", metavar="TEXT"),
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="Wrap the prompt in the model's chat template, if it has one.")
    ] = True,
    engine: Annotated[str, typer.Option(help="auto, eager, compiled or stream.")] = "auto",
    fuse: Annotated[bool, typer.Option(help="Run a sparse model's MLPs as one operator.")] = True,
    seed: Annotated[
        int, sampling_option(help="Seed of the draw, at a temperature above 0.", metavar="N")
    ] = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.SpreadDevice = "auto",
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
    from cats.recipes.generation import answer

    if fuse:
        options.fuse_where_possible(loaded)
    sampling: dict[str, Any] = {
        "do_sample": temperature > 0,
        "temperature": temperature or None,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop_strings": stop or None,
    }
    result = answer(
        loaded,
        tokenizer,
        prompt,
        chat=chat,
        engine=engine,
        max_new_tokens=max_new_tokens,
        on_text=None if as_json else partial(print, end="", flush=True),
        seed=seed,
        **{name: value for name, value in sampling.items() if value is not None},
    )
    if as_json:
        options.print_json({"model": model, "prompt": prompt, **asdict(result)})
    else:
        print()
        options.err.print(
            f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} tokens/s "
            f"({result.engine})",
            style="dim",
        )
