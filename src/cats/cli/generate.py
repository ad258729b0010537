"""``cats generate``: continue a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
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
        model, thresholds=thresholds, dtype=dtype, device=device, threads=threads,
        hub=options.hub(revision, subfolder, trust_remote_code),
    )  # fmt: skip
    from cats.decode.text import Detokenizer
    from cats.fusion import fuse_
    from cats.mlp import is_sparse

    if fuse and is_sparse(loaded):
        fuse_(loaded)
    text = Detokenizer(tokenizer, skip_special_tokens=True)
    given: dict[str, Any] = {
        "do_sample": temperature > 0, "temperature": temperature or None, "top_k": top_k,
        "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty,
        "stop_strings": stop or None,
    }  # fmt: skip

    def show(tokens: Any) -> None:
        print(text.add(tokens.tolist()), end="", flush=True)

    report = run(
        loaded, tokenizer, prompt, chat=chat, engine=engine, max_new_tokens=max_new_tokens,
        callback=None if as_json else show, seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    if as_json:
        options.print_json({"model": model, "prompt": prompt, **report})
    else:
        print(text.end())
        options.err.print(
            f"{report['new_tokens']} tokens, {report['tokens_per_second']:.1f} tokens/s "
            f"({report['engine']})",
            style="dim",
        )


def run(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = True,
    engine: str = "auto",
    callback: Callable[[Any], object] | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Generate, and time the tokens after the first, so that the prompt's pass is left out.

    Returns:
        ``text``, ``new_tokens``, ``engine``, and ``tokens_per_second`` of decoding (0 where one
        token came).
    """
    from cats.decode import Decoder

    ids = encode(tokenizer, prompt, chat=chat)
    times: list[float] = []

    def stamp(tokens: Any) -> None:
        times.append(time.perf_counter())
        if callback is not None:
            callback(tokens)

    decoder = Decoder(model, engine=engine)
    output = decoder.generate(
        ids,
        callback=stamp,
        tokenizer=tokenizer,
        **sampling,
    )
    return {
        "text": tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True),
        "new_tokens": len(times),
        "engine": decoder.engine,
        "tokens_per_second": tokens_per_second(times),
    }


def tokens_per_second(times: list[float]) -> float:
    """Of the tokens after the first; 0 where one token came. ``times`` in seconds, one a token."""
    seconds = times[-1] - times[0]
    return (len(times) - 1) / seconds if seconds > 0 else 0.0


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """Token ids ``[1, T]`` of a prompt, in the chat template where there is one.

    Raises:
        DataError: If there are none.
    """
    from cats.errors import DataError

    if chat and tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise DataError("the prompt has no tokens: give some text")
    return ids
