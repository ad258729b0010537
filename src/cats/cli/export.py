"""``cats export``: write a model as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cats.cli import bench_options, options


def export(
    model: bench_options.ModelOrShape,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The GGUF file.")],
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="NAME",
            help="How matrices are stored: q4_0, q4_1, q8_0, bf16, f16 or f32.",
        ),
    ] = "q8_0",
    table_kind: Annotated[
        str | None,
        typer.Option(
            "--table-type",
            metavar="NAME",
            help="How the embedding and the output head are stored.",
            show_default="q8_0 beside 4 bits, else as --type",
        ),
    ] = None,
    with_tokenizer: Annotated[
        bool,
        typer.Option("--tokenizer/--no-tokenizer", help="Store the tokenizer too."),
    ] = True,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write a Llama-shaped model as a GGUF file, for llama.cpp and for cats.

    Example: [b]cats export smollm2 --type q4_0 -o smollm2-q4_0.gguf[/b]

    Weights are rounded to nearest, as the package gguf does it. Thresholds are left out: keep their
    file beside the GGUF file. The name of a shape, such as llama-3.2-1b, gives random weights
    without a tokenizer.
    """
    with options.err.status("starting ..."):
        import torch

        from cats import formats
        from cats.benchmarks.shapes import SHAPES, random_model
        from cats.errors import ConfigError

    options.check_output(output)
    if output.suffix.lower() != ".gguf":
        raise ConfigError(f"-o {output}: expected a name that ends in .gguf")
    hub = options.hub(revision, subfolder, trust_remote_code)
    if model in SHAPES:
        torch.manual_seed(seed)
        name = "bfloat16" if dtype is options.Dtype.auto else dtype.value
        with options.err.status("drawing random weights ..."):
            loaded = random_model(model, bench_options.dtype_of(name), torch.device("cpu"))
        tokenizer = None
    else:
        loaded, tokenizer = options.load(model, dtype=dtype, device="cpu", dense=True, hub=hub)
    with options.counter("writing tensors", len(loaded.state_dict())) as advance:
        formats.export_gguf(
            loaded,
            output,
            kind=kind.lower(),
            table_kind=None if table_kind is None else table_kind.lower(),
            tokenizer=tokenizer if with_tokenizer else None,
            name=Path(model).name,
            on_tensor=advance,
        )
    size = output.stat().st_size / 1e6
    options.out.print(f"wrote {output}, {size:,.1f} MB", markup=False)
