"""``cats bench sessions``: sessions that come at random times."""

from __future__ import annotations

from typing import Annotated

import typer

from cats.cli import bench_options, options


def sessions(
    model: bench_options.ModelOrShape = "smollm2",
    sparsity: bench_options.Targets = "0,0.5",
    sessions: Annotated[int, options.number(min=2, help="How many sessions come.")] = 32,
    seconds: Annotated[
        float, typer.Option(min=0, help="Within how many seconds they come, at random times.")
    ] = 60.0,
    rows: Annotated[int, options.number(min=1, help="Sessions that decode together.")] = 16,
    prompts: Annotated[
        str, typer.Option(metavar="MIN,MAX", help="Tokens of the prompts.")
    ] = "32,512",
    new_tokens: Annotated[
        str, typer.Option(metavar="MIN,MAX", help="Tokens of the answers.")
    ] = "32,128",
    engine: Annotated[
        str, typer.Option(help="What runs the steps: modules, or stream on a GPU.")
    ] = "modules",
    longest_wait: Annotated[
        float, typer.Option(help="Milliseconds for which prompts may delay other sessions.")
    ] = 50.0,
    seed: Annotated[int, options.number(min=0, help="Of times and lengths.")] = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    output: bench_options.AppendEach = None,
    commit: options.Commit = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time sessions that come at random times, dense and CATS.

    Example: [b]cats bench sessions smollm2 --sessions 8 --seconds 20 -o results.jsonl[/b]

    Each set of sessions runs twice: as it comes, and all at once.
    """
    import torch

    from cats.benchmarks.sessions import Case, measure
    from cats.cli.running import stage
    from cats.report.sessions import LEGEND, tables

    options.check_output(output)
    torch.manual_seed(0)
    shortest, longest = bench_options.range_of(prompts, "--prompts")
    fewest, most = bench_options.range_of(new_tokens, "--new-tokens")
    case = Case(
        model=model,
        sparsities=tuple(bench_options.share_of(part) for part in sparsity.split(",")),
        engine=engine,
        sessions=sessions,
        seconds=seconds,
        rows=rows,
        shortest_prompt=shortest,
        longest_prompt=longest,
        fewest_tokens=fewest,
        most_tokens=most,
        longest_wait=longest_wait / 1e3,
        seed=seed,
    )
    hub = options.hub(revision, subfolder, trust_remote_code)
    length = max(256, longest)
    loaded, blocks = bench_options.model_and_text(model, dtype, device, sessions, length, hub)
    with stage() as show:
        measured = measure(loaded, blocks, case, commit=commit, on_stage=show)
        results = list(bench_options.append_each(output, measured))
    for table in tables(results):
        options.out.print(table.rich())
    bench_options.print_legend(LEGEND)
