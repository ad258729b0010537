"""``cats quantize``: round the weights of a model to 4 or 8 bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cats.cli import options
from cats.cli.running import Terminal

if TYPE_CHECKING:
    from cats.protocols import CausalModel, Tokenizer
    from cats.recipes import Quantisation


def quantize(
    model: options.Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the compressed-tensors checkpoint."
        ),
    ] = None,
    bits: Annotated[int, options.number(help="Bits of a weight: 4 or 8.")] = 4,
    group: Annotated[
        int | None,
        options.number(
            help="Columns that share a scale; -1 for a scale per row. 64 or 32 where a width is "
            "no multiple.",
            show_default="128 in 4 bits, a row in 8",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="gptq (calibrated on the text), or rtn (round to nearest)."),
    ] = "gptq",
    head: Annotated[
        bool,
        typer.Option("--head", help="Round the output head to 8 bits too."),
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help='Leave these linear layers as they are, such as "*.down_proj"; repeatable.',
        ),
    ] = None,
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
            show_default="32768",
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
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Round the weights of a model to 4 or 8 bits: an ordinary compressed-tensors checkpoint.

    Example: [b]cats quantize HuggingFaceTB/SmolLM2-135M --text c4.txt -o smollm2-int4[/b]

    Thresholds are calibrated afterwards, on the result.
    """
    # torch is imported here
    with options.err.status("starting ..."):
        from cats.quantisation import check_bits
        from cats.recipes import quantisation

    check_bits(bits, group)
    method = quantisation.check_method(method, has_blocks=True)
    tokens = options.tokens_or_default(tokens, 32_768, block)
    eval_tokens = options.tokens_or_default(eval_tokens, 10_000, block, "--eval-tokens")
    options.check_output(output, folder=True)
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, tokenizer = options.load(
        model, dtype=dtype, device=device, dense=True, threads=threads, hub=hub
    )
    from cats.checkpoint import is_sparse_checkpoint
    from cats.data import read_text, text_start
    from cats.recipes.text import split

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
    result = quantisation.quantise(
        loaded,
        blocks,
        held_out,
        bits=bits,
        group_size=group,
        method=method,
        head=head,
        exclude=exclude or [],
        batch_size=batch_size,
        progress=Terminal(),
    )
    if output is not None:
        _save(cast("CausalModel", loaded), tokenizer, output)
    text_name = options.describe_texts(text)
    had_thresholds = is_sparse_checkpoint(options.resolve(model, **hub), **hub)
    if as_json:
        about = {
            "model": model,
            "calibration_text": text_name if method == "gptq" else None,
            "bos": bool(text_start(tokenizer, bos)),
            "seed": seed,
            "thresholds_left_out": had_thresholds,
            "output": None if output is None else str(output),
        }
        options.print_json(asdict(result) | about)
        return
    _print(result, model, text_name, had_thresholds, output)


def _save(model: CausalModel, tokenizer: Tokenizer, output: Path) -> None:
    from cats.storage import replacing

    with replacing(output, directory=True) as temporary:
        # the generation config goes along
        model.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))


def _print(
    result: Quantisation, model: str, text_name: str, had_thresholds: bool, output: Path | None
) -> None:
    from rich.markup import escape

    from cats.cli.tables import quantisation_table

    options.out.print(quantisation_table(Path(model).name, result).rich())
    lines = [f"perplexity on {result.held_out_tokens:,} held-out tokens of {escape(text_name)}"]
    if result.calibration_tokens:
        lines.append(f"GPTQ on {result.calibration_tokens:,} other tokens of the same text")
    lines.append(f"left as they are: {escape(', '.join(_kinds(result.ignored)) or 'none')}")
    name = "MODEL" if output is None else str(output)
    calibrate = f"[b]cats calibrate {escape(name)} -o FILE.safetensors[/b]"
    if had_thresholds:
        lines.append(
            "the thresholds of the sparse model are left out: the quantised one has other "
            f"activations. Find new ones with {calibrate}"
        )
    else:
        lines.append(f"thresholds of the quantised model: {calibrate}")
    options.out.print("\n".join(lines))
    if output is not None:
        options.out.print(f"wrote {output}", markup=False)
    else:
        options.out.print("nothing written: name a folder with [b]-o DIR[/b]")


def _kinds(names: tuple[str, ...]) -> list[str]:
    """Names without the numbers of layers, once each."""
    return list(
        dict.fromkeys(
            ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
        )
    )
