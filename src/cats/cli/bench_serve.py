"""``cats bench serve``: the server beside its engine alone."""

from __future__ import annotations

from typing import Annotated

import typer

from cats.cli import bench_options, options


def serve(
    model: bench_options.ModelOrShape = "smollm2",
    thresholds: options.Thresholds = None,
    streams: Annotated[str, typer.Option(help="Answers at a time, by commas.")] = "1,16",
    prompt_length: Annotated[int, options.number(min=1, help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, options.number(min=3, help="Tokens of each answer.")] = 128,
    rounds: Annotated[int, options.number(min=2, help="Timed rounds, in turns.")] = 5,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    threads: options.Threads = None,
    output: bench_options.AppendEach = None,
    commit: options.Commit = None,
) -> None:
    """Time streams of the HTTP server and sessions of the engine alone, in turns.

    Example: [b]cats bench serve smollm2 --thresholds cats50.safetensors -o results.jsonl[/b]

    Rates are tokens of all streams per second, prompts included. The clients are a process of their
    own, so leave a processor free for them.
    """
    import torch

    from cats.cli.running import stage
    from cats.errors import ConfigError

    try:
        from cats.recipes.server_speed import Case, measure
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is missing: pip install 'cats-llm[serve]' brings what the server needs"
        ) from error
    from cats.report.serving import table

    options.check_output(output)
    torch.manual_seed(0)
    loaded, tokenizer = options.load(
        model, thresholds=thresholds, dtype=dtype, device=device, threads=threads
    )
    options.fuse_where_possible(loaded)
    block = getattr(loaded.config, "cats", None) or {}
    case = Case(
        name=model,
        target=float(block.get("target_sparsity") or 0),
        streams=tuple(bench_options.positive(part, "--streams") for part in streams.split(",")),
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        rounds=rounds,
    )
    with stage() as show:
        measured = measure(loaded, tokenizer, case, commit=commit, on_stage=show)
        results = list(bench_options.append_each(output, measured))
    options.out.print(table(results).rich())
