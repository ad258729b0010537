"""``cats calibrate``: find the thresholds of a model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats.cli import options
from cats.cli.running import duration, resumable

if TYPE_CHECKING:
    from torch import Tensor

    from cats.calibration import Statistics

# Batches between two saves of a long calibration.
_CHUNK = 32
_DEFAULT_TARGET = 0.5
# A search for the largest sparsity starts on one batch of so many.
_PART = 4


def calibrate(
    model: options.Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="NAME.safetensors: thresholds alone. A name without a suffix: folder for a whole "
            "checkpoint.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Target sparsity, inside (0, 1).", show_default="0.5")
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="Instead of --sparsity: the largest one whose held-out perplexity rises by at "
            "most this, such as 2%."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="cats, or relu (which has no target).")] = "cats",
    text: options.Texts = None,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text. Default: a fifth of the blocks, kept out of calibration."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Calibrate on at most so many, in whole blocks.", show_default="100000"
        ),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Held-out tokens, at most, in whole blocks.", show_default="10000"
        ),
    ] = None,
    block: options.Block = 512,
    bos: options.Bos = None,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help='Leave gated MLPs dense by pattern, such as "model.layers.0.*"; repeatable.'
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help=f"Save the counts here, every {_CHUNK} batches, and continue from them."),
    ] = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Find the thresholds at which a model drops a share of its neurons.

    Example: [b]cats calibrate HuggingFaceTB/SmolLM2-135M --text c4.txt -o cats50.safetensors[/b]

    Several processes share the work under [b]torchrun[/b] and find the same thresholds.
    """
    limit = _parse_percent(max_loss)
    # torch is imported here
    with options.err.status("starting ..."):
        target = _target(method, sparsity, limit)
    tokens = options.tokens_or_default(tokens, 100_000, block)
    eval_tokens = options.tokens_or_default(eval_tokens, 10_000, block, "--eval-tokens")
    if output is not None:
        options.check_output(output, folder=_is_folder(output))
    options.check_output(statistics)
    rank, world = _start_processes()
    loaded, tokenizer = options.load(
        model, dtype=dtype, device=options.process_device(device), dense=True,
        threads=threads,
        hub=options.hub(revision, subfolder, trust_remote_code),
    )  # fmt: skip
    from cats.data import text_start
    from cats.mlp import check_patterns

    check_patterns(loaded, exclude or [])
    with options.err.status("reading the text ..."):
        blocks, held_out = split(tokenizer, text, eval_text, block, tokens, eval_tokens, seed, bos)
    with resumable(statistics if rank == 0 else None):
        counted = _collect(
            loaded, blocks, batch_size, method, exclude or [], statistics, rank, world
        )
        if rank != 0:
            return
        held_out_batches = held_out.split(batch_size)
        if limit is None:
            dense = _perplexity(loaded, held_out_batches, "dense perplexity")
        else:
            target, dense = _largest_target(loaded, counted, held_out_batches, limit)
        report = _apply_and_measure(loaded, counted, target, held_out_batches)
    report |= {
        "model": model,
        "calibration_text": options.describe_texts(text),
        "held_out_tokens": held_out.numel(),
        "bos": bool(text_start(tokenizer, bos)),
        "perplexity_dense": dense,
        "max_loss": limit,
        "seed": seed,
        "output": None if output is None else str(output),
    }
    if output is not None:
        _save(loaded, tokenizer, counted.config(target), output)
    if as_json:
        options.print_json(report)
    else:
        _print(report)


def _parse_percent(value: str | None) -> float | None:
    from cats.errors import ConfigError

    if value is None:
        return None
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 < number < (10 if value.endswith("%") else 1):
        raise ConfigError(f"--max-loss must be a share such as 2% or 0.02, got {value!r}")
    return number


def _target(method: str, sparsity: float | None, limit: float | None) -> float | None:
    """The sparsity to calibrate for; None where the method has none, or a loss decides."""
    from cats.config import check_target
    from cats.errors import ConfigError
    from cats.methods import get_method

    if sparsity is not None and limit is not None:
        raise ConfigError("--max-loss looks for the sparsity: leave out --sparsity, or --max-loss")
    if not get_method(method).has_target:
        if sparsity is not None or limit is not None:
            option = "--sparsity" if limit is None else "--max-loss"
            raise ConfigError(f"method {method!r} has no sparsity to choose: leave out {option}")
        return None
    if limit is not None:
        return None
    target = _DEFAULT_TARGET if sparsity is None else sparsity
    check_target(target)
    return target


def _is_folder(output: Path) -> bool:
    """Whether a whole checkpoint is asked for, and not a thresholds file.

    Raises:
        ConfigError: If the name is that of another kind of file.
    """
    from cats.errors import ConfigError

    # what follows the dot of Qwen2.5-7B or Llama-3.2-1B is no suffix
    if output.suffix[1:2].isalpha() and output.suffix != ".safetensors" and not output.is_dir():
        raise ConfigError(
            f"{output}: neither a thresholds file nor a folder: give NAME.safetensors for the "
            f"thresholds alone, or a name without {output.suffix} for a whole checkpoint"
        )
    return output.suffix != ".safetensors"


def _start_processes() -> tuple[int, int]:
    """Rank and number of processes; joins the group that torchrun prepared."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def split(
    tokenizer: Any,
    text: list[Path] | None,
    eval_text: Path | None,
    block: int,
    tokens: int,
    eval_tokens: int,
    seed: int,
    bos: bool | None,
) -> tuple[Tensor, Tensor]:
    """Calibration blocks and held-out blocks, drawn from the text by the seed."""
    import torch

    from cats.data import read_text, token_blocks
    from cats.errors import DataError

    blocks = token_blocks(tokenizer, options.texts_or_sample(text), length=block, bos=bos)
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]
    wanted = eval_tokens // block
    if eval_text is not None:
        held_out = token_blocks(tokenizer, read_text(eval_text), length=block, bos=bos)[:wanted]
    else:
        wanted = min(wanted, max(1, len(blocks) // 5))
        blocks, held_out = blocks[wanted:], blocks[:wanted]
    if not len(blocks):
        raise DataError(
            f"the text fills one block of {block} tokens, and one is held out: give more text, "
            "a smaller --block, or --eval-text"
        )
    return blocks[: tokens // block], held_out


def _collect(
    model: Any,
    blocks: Tensor,
    batch_size: int,
    method: str,
    exclude: list[str],
    path: Path | None,
    rank: int,
    world: int,
) -> Statistics:
    """Count chunk by chunk, each shared by all processes, saving after each."""
    from cats.calibration import Statistics, collect
    from cats.calibration.collect import block_hash
    from cats.errors import DataError

    counted = collect(model, [], method=method, exclude=exclude)
    # the file is that of the first process, which alone writes it
    if path is not None and path.exists() and rank == 0:
        counted += Statistics.load(path)
        if counted.blocks > len(blocks):
            raise DataError(
                f"{path}: holds {counted.tokens:,} tokens, more than are asked for now: "
                "give as many with --tokens, or name another file with --statistics"
            )
        if sum(map(block_hash, blocks[: counted.blocks])) % (1 << 64) != counted.text_hash:
            raise DataError(
                f"{path}: counts of another text, seed, block length or start of a block (--bos); "
                "delete it or name another file with --statistics"
            )
    left = blocks[_from_first_process(counted.blocks, world) :]
    batches = left.split(batch_size) if len(left) else ()
    # each chunk's counts are a second copy in memory: none where nothing is saved in between
    chunk = _CHUNK * world if path is not None or world > 1 else max(1, len(batches))
    chunks = [batches[i : i + chunk] for i in range(0, len(batches), chunk)]
    show = rank == 0
    for i, part in enumerate(chunks):
        label = "calibrating" if len(chunks) == 1 else f"calibrating {i + 1}/{len(chunks)}"
        mine = part[rank::world]
        bar = options.progress(mine, label, show=show)
        share = collect(model, bar, method=method, exclude=exclude)
        share = share.all_reduce() if world > 1 else share
        counted = share if not counted.tokens else counted + share
        if path is not None and rank == 0:
            counted.save(path)
    return counted


def _from_first_process(number: int, world: int) -> int:
    if world == 1:
        return number
    import torch.distributed as dist

    numbers = [number]
    dist.broadcast_object_list(numbers)
    return numbers[0]


def _perplexity(model: Any, batches: tuple[Tensor, ...], label: str) -> float:
    from cats.metrics import perplexity

    return perplexity(model, options.progress(batches, label))


def _largest_target(
    model: Any, counted: Statistics, batches: tuple[Tensor, ...], limit: float
) -> tuple[float, float]:
    """The largest whole percentage whose perplexity is within the limit, and dense perplexity.

    Percentages are compared on a part of the text. What is found there is confirmed on the whole:
    it is within the limit, and one percent more is not; otherwise the search goes on there.
    """
    from cats.apply import densify_
    from cats.errors import ConfigError

    perplexity = _Perplexities(model, counted, batches)
    perplexity.of_part(0)
    perplexity.announce()
    dense = perplexity.of_whole(0)
    low, high = 0, 100

    def look(percent: int, of: Callable[[int], float]) -> None:
        nonlocal low, high
        within = of(percent) / of(0) - 1 <= limit
        low, high = (percent, high) if within else (low, percent)

    while high - low > 1:
        look((low + high) // 2, perplexity.of_part)
    guess, low, high = max(low, 1), 0, 100
    # from the guess in steps of 1, 2, 4, ... percent until the limit lies between two of them
    look(guess, perplexity.of_whole)
    step = 1 if low == guess else -1
    while (high if step > 0 else low) in (0, 100) and high - low > 1:
        start = low if step > 0 else high
        look(min(99, max(1, start + step)), perplexity.of_whole)
        step *= 2
    while high - low > 1:
        look((low + high) // 2, perplexity.of_whole)
    densify_(model)
    if low == 0:
        raise ConfigError(
            f"even 1 % sparsity raises the held-out perplexity by more than {limit:.2%}: "
            "allow a larger --max-loss"
        )
    return low / 100, dense


class _Perplexities:
    """Perplexity of a model at a percentage of sparsity, on a part of a text and on all of it.

    Nothing is measured twice: what the part gave counts for the whole as well.
    """

    def __init__(self, model: Any, counted: Statistics, batches: tuple[Tensor, ...]) -> None:
        self._model, self._counted = model, counted
        cut = max(1, len(batches) // _PART)
        self._pieces = [piece for piece in (batches[:cut], batches[cut:]) if piece]
        # predicted tokens: of all but the first of each block
        self._tokens = [sum(b[:, 1:].numel() for b in piece) for piece in self._pieces]
        self._found: dict[tuple[int, int], float] = {}
        self._seconds = 0.0

    def of_part(self, percent: int) -> float:
        """On the part; 0 % is the dense model."""
        return self._of(percent, 0)

    def of_whole(self, percent: int) -> float:
        """On the whole text; 0 % is the dense model."""
        losses = [math.log(self._of(percent, i)) for i in range(len(self._pieces))]
        total = sum(loss * n for loss, n in zip(losses, self._tokens, strict=True))
        return math.exp(total / sum(self._tokens))

    def announce(self) -> None:
        """Say how long one perplexity takes, by the one that was measured last."""
        whole = self._seconds * sum(self._tokens) / self._tokens[0]
        options.err.print(
            f"One perplexity takes about {duration(self._seconds)} on a part of the held-out text "
            f"and {duration(whole)} on all of it. The search needs about 8 of a part and 3 of all.",
            highlight=False,
        )

    def _of(self, percent: int, i: int) -> float:
        from cats.apply import densify_, sparsify_

        if (percent, i) not in self._found:
            if percent:
                sparsify_(self._model, self._counted.config(percent / 100))
            else:
                densify_(self._model)
            start = time.perf_counter()
            label = f"at {percent} %, " + ("a part" if i == 0 else "the rest")
            self._found[percent, i] = _perplexity(self._model, self._pieces[i], label)
            self._seconds = time.perf_counter() - start
        return self._found[percent, i]


def _apply_and_measure(
    model: Any, counted: Statistics, target: float | None, batches: tuple[Tensor, ...]
) -> dict[str, Any]:
    from cats.apply import sparsify_
    from cats.metrics import perplexity_and_sparsity

    config = counted.config(target)
    sparsify_(model, config)
    perplexity, realized = perplexity_and_sparsity(
        model, options.progress(batches, "sparse perplexity")
    )
    return {
        "method": config.method,
        "target_sparsity": target,
        "calibration_tokens": config.calibration_tokens,
        "calibration_hash": config.calibration_hash,
        "thresholds": {name: float(t.mean()) for name, t in config.thresholds.items()},
        "realized_sparsity_calibration": config.realized_sparsity,
        "realized_sparsity": realized,
        "perplexity_sparse": perplexity,
    }


def _save(model: Any, tokenizer: Any, config: Any, output: Path) -> None:
    from cats.storage import replacing

    if not _is_folder(output):
        config.save(output)
        return
    with replacing(output, directory=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape

    from cats.cli.tables import layer_table, loss

    options.out.print(layer_table(report["thresholds"], report["realized_sparsity"]))
    target = report["target_sparsity"]
    if report["max_loss"] is not None:
        options.out.print(
            f"[b]{target:.0%}[/b] is the largest sparsity whose held-out perplexity rises by at "
            f"most {report['max_loss']:.2%}"
        )
    dense, sparse = report["perplexity_dense"], report["perplexity_sparse"]
    options.out.print(
        f"perplexity on {report['held_out_tokens']:,} held-out tokens: dense {dense:.3f}, "
        f"{report['method']} {sparse:.3f} ({loss(dense, sparse)})\n"
        f"calibrated on {report['calibration_tokens']:,} tokens of "
        + escape(report["calibration_text"])
    )
    if report["output"]:
        options.out.print(f"wrote {report['output']}", markup=False)
    else:
        options.out.print("nothing written: name a file with [b]-o NAME.safetensors[/b]")
