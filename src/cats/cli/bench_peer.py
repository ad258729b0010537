"""``cats bench peer``: our decode loop beside llama.cpp, on one GGUF file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cats.cli import bench_options, options

peer_option = partial(typer.Option, rich_help_panel="llama.cpp")


def peer(
    model: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A GGUF file, or [b]smollm2-gguf[/b]."),
    ] = "smollm2-gguf",
    sparsity: bench_options.Targets = "0,0.5",
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="Engine of our decode loop.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Dtype that our loop computes in.")] = "float32",
    threads: Annotated[
        int | None,
        options.number(min=1, help="Threads of each program.", show_default="one per processor"),
    ] = None,
    load: bench_options.Load = 0,
    prompt_length: Annotated[int, options.number(min=1, help="Tokens of the prompt.")] = 32,
    new_tokens: Annotated[int, options.number(min=3, help="Tokens to generate.")] = 128,
    prefill: Annotated[
        int, options.number(min=0, help="Tokens of a prompt that is timed by itself; 0: none.")
    ] = 512,
    rounds: Annotated[int, options.number(min=2, help="Runs per program, in turns.")] = 5,
    calibration_tokens: Annotated[
        int, options.number(min=1, help="Use at most N calibration tokens.")
    ] = 4096,
    read_mib: Annotated[
        int, options.number(min=1, help="MiB to read when the memory limit is measured.")
    ] = 1024,
    with_peer: Annotated[
        bool, peer_option("--peer/--no-peer", help="Time llama.cpp beside our loop.")
    ] = True,
    peer_python: Annotated[
        str | None,
        peer_option(
            metavar="PATH",
            help="An interpreter that has the package cyllama.",
            show_default="the one that runs cats",
        ),
    ] = None,
    llama_bench: Annotated[
        Path | None,
        peer_option(metavar="PATH", help="The program llama-bench, to run it too."),
    ] = None,
    output: bench_options.AppendEach = None,
    commit: options.Commit = None,
) -> None:
    """Time our decode loop and llama.cpp in turns, on one GGUF file and the same threads.

    Example: [b]cats bench peer smollm2-gguf --load 2 -o results.jsonl[/b]

    A token is timed after a prompt of --prompt-length, a prompt of --prefill by its first token,
    and memory in processes of their own. llama.cpp runs through the package cyllama. Files are made
    by [b]cats export[/b].
    """
    import sys

    import torch

    from cats import checkpoint, formats, smollm2
    from cats.benchmarks.peers import Case, measure
    from cats.cli.running import stage
    from cats.cli.threads import processors
    from cats.data import sample_text, token_blocks
    from cats.errors import ConfigError
    from cats.report.peers import LEGEND, tables

    options.check_output(output)
    options.quiet()
    torch.manual_seed(0)
    path = Path(checkpoint.locate(model))
    if path.suffix.lower() != ".gguf":
        raise ConfigError(f"{model}: expected a GGUF file; cats export makes one")
    config = checkpoint.load_config(str(path))
    length = max(256, prompt_length + new_tokens, prefill)
    count = -(-calibration_tokens // length)
    if formats.has_tokenizer(path):
        tokenizer = checkpoint.load_tokenizer(str(path))
        blocks = token_blocks(tokenizer, sample_text(), length=length, limit=count)
    else:
        # of random weights: any tokens
        blocks = torch.randint(0, config.vocab_size, (count, length))
    case = Case(
        path=path,
        model="smollm2" if model == smollm2.GGUF_NAME else path.stem,
        sparsities=tuple(bench_options.share_of(part) for part in sparsity.split(",")),
        engine=engine,
        dtype=bench_options.dtype_of(dtype),
        threads=threads or max(1, round(processors())),
        load=load,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        prefill=prefill,
        rounds=rounds,
        peer_python=(peer_python or sys.executable) if with_peer else None,
        llama_bench=llama_bench,
        read_bytes=read_mib * 2**20,
    )
    with stage() as show:
        measured = measure(case, blocks, commit=commit, on_stage=show)
        results = list(bench_options.append_each(output, measured))
    for table in tables(results):
        options.out.print(table.rich())
    bench_options.print_legend(LEGEND)
