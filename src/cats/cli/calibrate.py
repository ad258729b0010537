"""``cats calibrate``: find the thresholds of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cats.cli import options
from cats.cli.running import Terminal, resumable
from cats.errors import ConfigError

if TYPE_CHECKING:
    from cats.config import CatsConfig
    from cats.protocols import CausalModel, Tokenizer
    from cats.recipes import Calibration


def calibrate(
    model: options.Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="NAME.safetensors for the thresholds only; a name without a suffix is a folder "
            "for a whole checkpoint.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Target sparsity, inside (0, 1).", show_default="0.5")
    ] = None,
    bytes_: Annotated[
        float | None,
        typer.Option(
            "--bytes",
            help="Instead of --sparsity: share of the bytes of the MLPs (and of attention's "
            "projections) that a token reads, inside (0, 1).",
            show_default="0.5 for methods with several masks",
        ),
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="Instead of a target: skip as much as the held-out perplexity allows, which rises "
            "by no more than this, such as 2%."
        ),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Instead of a target: skip the least that makes a token X times as fast as dense, "
            "by --costs.",
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What [b]cats bench costs MODEL[/b] measured of this model on this device.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="cats; relu (which has no target); or one with several masks, whose split is "
            "searched: neuron, two-stage, teal, cascade."
        ),
    ] = "cats",
    attention: Annotated[
        bool,
        typer.Option(
            "--attention", help="Drop inputs of attention's projections too (several masks)."
        ),
    ] = False,
    text: options.Texts = None,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Held-out text. Default: a fifth of the blocks, left out of calibration.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        options.number(
            min=1,
            help="Use at most N calibration tokens, in whole blocks.",
            show_default="100000",
        ),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        options.number(
            min=2,
            help="Use at most N held-out tokens, in whole blocks.",
            show_default="10000",
        ),
    ] = None,
    block: options.Block = 512,
    bos: options.Bos = None,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help='Leave these gated MLPs dense, such as "model.layers.0.*"; repeatable.',
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save counts, or inputs and paths, to this file on the way, and continue from it.",
        ),
    ] = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.SpreadDevice = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Find the thresholds with which a model skips a share of its weights.

    Example: [b]cats calibrate HuggingFaceTB/SmolLM2-135M --text c4.txt -o cats50.safetensors[/b]

    Example: [b]cats calibrate smollm2 --method cascade --bytes 0.5 -o cascade.safetensors[/b]

    Several processes share the work under [b]torchrun[/b] and find the same thresholds.
    """
    limit = _parse_percent(max_loss)
    # torch is imported here
    with options.err.status("starting ..."):
        from cats.processes import join_processes
        from cats.recipes import calibration

    calibration.check_goal(method, sparsity, bytes_, limit, speed, attention)
    tokens = options.tokens_or_default(tokens, 100_000, block)
    eval_tokens = options.tokens_or_default(eval_tokens, 10_000, block, "--eval-tokens")
    if output is not None:
        options.check_output(output, folder=_is_folder(output))
    options.check_output(statistics)
    rank, _ = join_processes()
    if output is None and rank == 0:
        options.err.print(
            "the thresholds will not be written: name a file with [b]-o NAME.safetensors[/b]"
        )
    loaded, tokenizer = options.load(
        model,
        dtype=dtype,
        device=options.process_device(device),
        dense=True,
        threads=threads,
        hub=options.hub(revision, subfolder, trust_remote_code),
    )
    from cats.data import read_text, text_start
    from cats.model import check_patterns
    from cats.recipes.text import split

    check_patterns(loaded, exclude or [])
    with options.err.status("reading the text ..."):
        blocks, held_out = split(
            tokenizer,
            options.texts_or_sample(text),
            block=block,
            tokens=tokens,
            held_out_tokens=eval_tokens,
            seed=seed,
            bos=bos,
            held_out_text=None if eval_text is None else read_text(eval_text),
        )
    with resumable(statistics if rank == 0 else None):
        calibrated = calibration.calibrate(
            loaded,
            blocks,
            held_out,
            target_sparsity=sparsity,
            target_bytes=bytes_,
            max_loss=limit,
            speed=speed,
            costs=costs,
            method=method,
            attention=attention,
            exclude=exclude or [],
            batch_size=batch_size,
            statistics=statistics,
            progress=Terminal(),
        )
    if calibrated is None:
        return
    text_name = options.describe_texts(text)
    if output is not None:
        facts = {
            "calibrated on": text_name,
            f"perplexity on {calibrated.held_out_tokens:,} held-out tokens": (
                f"{calibrated.perplexity_sparse:.3f} (dense {calibrated.perplexity_dense:.3f})"
            ),
        }
        _save(cast("CausalModel", loaded), tokenizer, calibrated.config, output, facts)
    if not as_json:
        _print(calibrated, limit, text_name, output)
        return
    about = {
        "model": model,
        "calibration_text": text_name,
        "bos": bool(text_start(tokenizer, bos)),
        "max_loss": limit,
        "seed": seed,
        "output": None if output is None else str(output),
    }
    options.print_json(_to_dict(calibrated) | about)


def _to_dict(calibrated: Calibration) -> dict[str, object]:
    config = calibrated.config
    return {
        "method": config.method,
        "target_sparsity": config.target_sparsity,
        "target_bytes": config.target_bytes,
        "bytes_read": calibrated.bytes_read,
        "calibration_tokens": config.calibration_tokens,
        "calibration_hash": config.calibration_hash,
        "thresholds": _mean_thresholds(config),
        "realized_sparsity_calibration": config.realized_sparsity,
        "realized_sparsity": calibrated.realized_sparsity,
        "perplexity_dense": calibrated.perplexity_dense,
        "perplexity_sparse": calibrated.perplexity_sparse,
        "held_out_tokens": calibrated.held_out_tokens,
    }


def _mean_thresholds(config: CatsConfig) -> dict[str, float]:
    return {name: float(threshold.mean()) for name, threshold in config.thresholds.items()}


def _parse_percent(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 < number < (10 if value.endswith("%") else 1):
        raise ConfigError(f"--max-loss must be a share such as 2% or 0.02, got {value!r}")
    return number


def _is_folder(output: Path) -> bool:
    """Whether the output is a whole checkpoint instead of a thresholds file.

    Raises:
        ConfigError: If the name is that of another kind of file.
    """
    # the names Qwen2.5-7B and Llama-3.2-1B have a dot, but no suffix
    if output.suffix[1:2].isalpha() and output.suffix != ".safetensors" and not output.is_dir():
        raise ConfigError(
            f"{output}: neither a thresholds file nor a folder: give NAME.safetensors for the "
            f"thresholds only, or a name without {output.suffix} for a whole checkpoint"
        )
    return output.suffix != ".safetensors"


def _save(
    model: CausalModel,
    tokenizer: Tokenizer,
    config: CatsConfig,
    output: Path,
    facts: dict[str, str],
) -> None:
    from cats.card import write_card
    from cats.storage import replacing

    if not _is_folder(output):
        config.save(output)
        return
    with replacing(output, directory=True) as temporary:
        model.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
        write_card(temporary, config.to_dict(), base=model.config.name_or_path, facts=facts)


def _print(
    calibrated: Calibration, max_loss: float | None, text_name: str, output: Path | None
) -> None:
    from rich.markup import escape

    from cats.cli.tables import layer_table, loss

    config = calibrated.config
    dense, sparse = calibrated.perplexity_dense, calibrated.perplexity_sparse
    table = layer_table(_mean_thresholds(config), calibrated.realized_sparsity)
    options.out.print(table.rich())
    if max_loss is not None:
        found = (
            f"[b]{config.target_sparsity:.0%}[/b] is the largest sparsity"
            if config.target_bytes is None
            else f"[b]{config.target_bytes:.0%}[/b] is the least share of bytes"
        )
        options.out.print(f"{found} whose held-out perplexity rises by no more than {max_loss:.2%}")
    options.out.print(f"a token reads {calibrated.bytes_read:.1%} of the layers that have masks")
    options.out.print(
        f"perplexity on {calibrated.held_out_tokens:,} held-out tokens: dense {dense:.3f}, "
        f"{config.method} {sparse:.3f} ({loss(dense, sparse)})\n"
        f"calibrated on {config.calibration_tokens:,} tokens of {escape(text_name)}"
    )
    if output is not None:
        options.out.print(f"wrote {output}", markup=False)
