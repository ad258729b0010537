"""Options that the commands of ``cats bench`` share, and the values that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cats.cli import options

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cats.results import Result

R = TypeVar("R", bound="Result")

ModelOrShape = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a Hugging Face id, or [b]smollm2[/b]; mistral-7b, llama-2-7b or "
        "llama-3.2-1b for random weights.",
    ),
]
Targets = Annotated[str, typer.Option(help="Targets of CATS, separated by commas; 0: dense.")]
AppendEach = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Append each result to this file at once."),
]
Load = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Keep processors busy by N processes while the models are timed."
    ),
]


def append_each(output: Path | None, results: Iterable[R]) -> Iterator[R]:
    """Yield the results; append each one to the file, if there is one, before it is yielded."""
    from cats.results import append_results

    for result in results:
        if output is not None:
            append_results(output, [result])
        yield result


def model_and_text(
    model: str, dtype: options.Dtype, device: str, count: int, length: int, hub: options.Hub
) -> tuple[nn.Module, Tensor]:
    """A dense model, or random weights of a shape, and token ids ``[count, length]`` for it."""
    import torch

    from cats.benchmarks.shapes import SHAPES, random_model
    from cats.data import sample_text, token_blocks
    from cats.errors import ConfigError

    if model in SHAPES:
        if hub:
            raise ConfigError(f"{model} has random weights: leave out options of the hub")
        options.quiet()
        name = "bfloat16" if dtype is options.Dtype.auto else dtype.value
        loaded = random_model(model, dtype_of(name), options.torch_device(device))
        return loaded, torch.randint(0, SHAPES[model]["vocab_size"], (count, length))
    loaded, tokenizer = options.load(model, dtype=dtype, device=device, dense=True, hub=hub)
    with options.err.status("reading the text ..."):
        return loaded, token_blocks(tokenizer, sample_text(), length=length, limit=count)


def print_legend(text: str) -> None:
    options.out.print(text.replace("\n", " "), style="dim", highlight=False)


def shape_of(text: str) -> tuple[int, int]:
    hidden, _, intermediate = text.partition("x")
    return positive(hidden, "--shape"), positive(intermediate, "--shape")


def positive(text: str, option: str) -> int:
    from cats.errors import ConfigError

    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option}: expected a positive number, got {text!r}")
    return int(text)


def range_of(text: str, option: str) -> tuple[int, int]:
    """The two numbers of ``MIN,MAX``; a single one is both."""
    first, _, last = text.partition(",")
    return positive(first, option), positive(last or first, option)


def share_of(text: str) -> float:
    from cats.errors import ConfigError

    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"--sparsity: expected numbers separated by commas, got {text!r}"
        ) from error


def dtype_of(name: str) -> torch.dtype:
    import torch

    from cats.errors import ConfigError

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise ConfigError(f"--dtype: expected {', '.join(known)}; got {name!r}")
    return known[name]
