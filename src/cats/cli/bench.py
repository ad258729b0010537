"""``cats bench``: time the gated MLP and whole models."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from cats.cli import bench_options, options

app = typer.Typer(
    help="Time the gated MLP, decoding and fine-tuning; show results.", no_args_is_help=True
)

other_option = partial(typer.Option, rich_help_panel="Other measurements")


@app.command()
def mlp(
    shape: Annotated[
        list[str],
        typer.Option(
            metavar="DxF", help="Hidden x intermediate size, such as 4096x14336; repeatable."
        ),
    ],
    sparsity: Annotated[
        str, typer.Option(help="Shares of dropped neurons, by commas.")
    ] = "0,0.5,0.7,0.9",
    dtype: Annotated[str, typer.Option(help="Dtypes, by commas.")] = "bfloat16",
    batch: Annotated[str, typer.Option(help="Numbers of tokens, by commas.")] = "1",
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A backend, or [b]paper[/b]; repeatable. Default: all that are live.",
        ),
    ] = None,
    device: options.Device = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the results to this file.")
    ] = None,
    rounds: Annotated[int, options.number(min=2, help="Timed passes of each variant.")] = 50,
    read_mib: Annotated[
        int, options.number(min=1, help="MiB to read when the memory limit is measured.")
    ] = 4096,
    compiled: Annotated[bool, typer.Option(help="Time the dense MLP of torch.compile too.")] = True,
    bits: Annotated[
        int | None,
        other_option(metavar="N", help="Time the MLP over codes of 4 or 8 bits."),
    ] = None,
    group: Annotated[
        int | None,
        other_option(
            metavar="N",
            help="With --bits, columns that share a scale; -1 for a scale per row.",
            show_default="128 in 4 bits, a row in 8",
        ),
    ] = None,
    commit: options.Commit = None,
) -> None:
    """Time one call of the gated MLP, of each dense MLP, and the memory limit.

    Example: [b]cats bench mlp --shape 4096x14336 --shape 4096x11008 -o results.jsonl[/b]

    With --bits, dense MLPs in the dtype and, where it runs, torch's own int4 operator are timed
    beside the operator over codes. Fractions of the limit are of the bytes that each of them reads.

    Each combination of the lists is timed. A kernel whose result is wrong is not timed.
    """
    from cats.benchmarks.mlp import Case, measure
    from cats.cli.running import stage
    from cats.errors import ConfigError
    from cats.quantisation import check_bits
    from cats.report.mlp import panels, table
    from cats.results import append_results

    options.check_output(output)
    if bits is None and group is not None:
        raise ConfigError("--group goes with --bits")
    group_size = None if bits is None else check_bits(bits, group)
    device = str(options.torch_device(device))
    cases = [
        Case(
            hidden_size=sizes[0],
            intermediate_size=sizes[1],
            dtype=bench_options.dtype_of(name),
            batch=bench_options.positive(tokens, "--batch"),
            device=device,
            rounds=rounds,
            sparsities=tuple(bench_options.share_of(part) for part in sparsity.split(",")),
            backends=tuple(backend or ()),
            size=read_mib * 2**20,
            compiled=compiled,
            bits=bits,
            group_size=group_size,
        )
        for sizes, name, tokens in product(
            map(bench_options.shape_of, shape), dtype.split(","), batch.split(",")
        )
    ]
    for case in cases:
        with stage() as show:
            show(
                f"timing the MLP {case.hidden_size}x{case.intermediate_size}, "
                f"{str(case.dtype).removeprefix('torch.')}, batch {case.batch}"
            )
            results = list(measure(case, commit=commit))
        if output is not None:
            append_results(output, results)
        for panel in panels(results):
            options.out.print(table(panel).rich())


@app.command()
def model(
    shape: Annotated[str, typer.Option(help="mistral-7b, llama-2-7b, llama-3.2-1b, ...")],
    layers: Annotated[int | None, options.number(min=1, help="Fewer layers than it has.")] = None,
    sparsity: Annotated[float, typer.Option(help="Target sparsity, inside (0, 1).")] = 0.5,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "bfloat16",
    prefill: Annotated[int, options.number(min=1, help="Tokens of the timed prompt.")] = 2048,
    new_tokens: Annotated[int, options.number(min=2, help="Tokens to generate.")] = 128,
    cache: Annotated[
        str, typer.Option(help="Caches of model.generate, by commas.")
    ] = "dynamic,static",
    device: options.Device = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the results to this file.")
    ] = None,
    rounds: Annotated[int, options.number(min=2, help="Timed runs of each variant.")] = 5,
) -> None:
    """Time prefill and model.generate of a whole model with random weights.

    Example: [b]cats bench model --shape mistral-7b --layers 8 -o results.jsonl[/b]
    """
    from cats.benchmarks.model import Case, measure
    from cats.cli.running import stage
    from cats.config import label_of
    from cats.report.model import table
    from cats.results import append_results

    options.quiet()
    options.check_output(output)
    case = Case(
        shape=shape,
        layers=layers,
        sparsity=sparsity,
        dtype=bench_options.dtype_of(dtype),
        prefill=prefill,
        new_tokens=new_tokens,
        caches=tuple(cache.split(",")),
        rounds=rounds,
        device=str(options.torch_device(device)),
    )
    with stage() as show:
        show(f"timing {shape}, dense and {label_of('cats', sparsity)}")
        results = list(measure(case))
    if output is not None:
        append_results(output, results)
    options.out.print(table(results).rich())


@app.command()
def decode(
    model: bench_options.ModelOrShape = "smollm2",
    sparsity: bench_options.Targets = "0,0.5,0.7",
    engine: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Engine, such as auto; repeatable.")
    ] = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    batch: Annotated[int, options.number(min=1, help="Prompts per batch.")] = 1,
    rows: Annotated[
        str | None,
        other_option(
            metavar="N,N",
            help="Time sessions that decode together instead of a batch, so many at a time.",
        ),
    ] = None,
    prompt_length: Annotated[int, options.number(min=1, help="Tokens of the prompt.")] = 32,
    new_tokens: Annotated[int, options.number(min=3, help="Tokens to generate.")] = 128,
    rounds: Annotated[int, options.number(min=2, help="Runs per engine, in turns.")] = 5,
    generate_rounds: Annotated[
        int,
        other_option(min=2, metavar="N", help="Runs of model.generate."),
    ] = 2,
    calibration_tokens: Annotated[
        int, options.number(min=1, help="Use at most N calibration tokens.")
    ] = 8192,
    read_mib: Annotated[
        int, options.number(min=1, help="MiB to read when the memory limit is measured.")
    ] = 4096,
    generate: Annotated[
        bool,
        other_option(help="Time model.generate beside the loop."),
    ] = True,
    static: Annotated[
        bool,
        other_option(help="Time model.generate with a static cache and compilation too."),
    ] = False,
    bits: Annotated[
        int | None,
        other_option(min=4, max=8, metavar="N", help="Round the weights to 4 or 8 bits first."),
    ] = None,
    group: Annotated[
        int | None,
        other_option(min=1, metavar="N", help="Columns that share a scale; else a row does."),
    ] = None,
    torch_int4: Annotated[
        bool,
        other_option(help="Time torch's own int4 operator too; with --bits 4, on a GPU."),
    ] = False,
    launches: Annotated[
        bool,
        other_option(help="List the kernels of a step, in a separate run; on a GPU."),
    ] = False,
    load: bench_options.Load = 0,
    output: bench_options.AppendEach = None,
    commit: options.Commit = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time a token of dense and CATS models, in cats and in transformers.

    Example: [b]cats bench decode smollm2 --dtype float32 -o results.jsonl[/b]
    """
    import torch

    from cats.benchmarks.busy import busy_processes
    from cats.benchmarks.decode import Case, measure
    from cats.benchmarks.decode_rows import measure_rows
    from cats.cli.running import stage
    from cats.errors import ConfigError
    from cats.report.tokens import LEGEND, panels, tables

    options.check_output(output)
    torch.manual_seed(0)
    case = Case(
        model=model,
        sparsities=tuple(bench_options.share_of(part) for part in sparsity.split(",")),
        engines=tuple(engine or ("modules" if rows else "auto",)),
        batch=batch,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        rounds=rounds,
        generate_rounds=generate_rounds,
        read_bytes=read_mib * 2**20,
        generate=generate,
        generate_compiled=static,
        bits=bits,
        group_size=group,
        torch_int4=torch_int4,
        launches=launches,
        load=load,
    )
    length = max(256, prompt_length + new_tokens)
    counts = [bench_options.positive(part, "--rows") for part in (rows or str(batch)).split(",")]
    if rows and (batch > 1 or bits is not None or static or torch_int4 or launches):
        raise ConfigError(
            "--rows times sessions of dense and CATS models: leave out --batch, --bits, --static, "
            "--torch-int4 and --launches"
        )
    count = max(*counts, -(-calibration_tokens // length))
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, blocks = bench_options.model_and_text(model, dtype, device, count, length, hub)
    if bits is not None:
        from cats.quantisation import quantise_, select

        fitting = select(loaded, bits=bits, group_size=group or -1).group_size
        if fitting != group:
            raise ConfigError(
                f"--group {group}: a width of {model} is no multiple; take --group {fitting}"
            )
        quantise_(loaded, bits=bits, group_size=group or -1)
    with stage() as show, busy_processes(load):
        if rows:
            measured = measure_rows(loaded, blocks, case, counts, commit=commit, on_stage=show)
        else:
            measured = measure(loaded, blocks, case, commit=commit, on_stage=show)
        results = list(bench_options.append_each(output, measured))
    for panel in panels(results):
        for table in tables(panel):
            options.out.print(table.rich())
    bench_options.print_legend(LEGEND)


@app.command()
def costs(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the results to this file.")],
    rounds: Annotated[int, options.number(min=2, help="Timed passes of each mask.")] = 7,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    threads: options.Threads = None,
    commit: options.Commit = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time what each kind of mask saves on this device, for [b]cats calibrate --speed[/b].

    Example: [b]cats bench costs smollm2 -o costs.jsonl[/b]
    """
    from cats.benchmarks.costs import measure
    from cats.cli.running import stage
    from cats.recipes.evaluation import write_results

    options.check_output(output)
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, _ = options.load(
        model, dtype=dtype, device=device, dense=True, hub=hub, threads=threads
    )
    with stage() as show:
        results = list(measure(loaded, name=model, rounds=rounds, commit=commit, on_stage=show))
    write_results(output, results)
    for result in results:
        what = " ".join(str(v) for n, v in result.settings.items() if n in ("mask", "dropped"))
        options.out.print(f"{result.quantity} {what}: {result.value:.3f} ms", highlight=False)


@app.command()
def timeline(
    model: bench_options.ModelOrShape = "smollm2",
    sparsity: bench_options.Targets = "0,0.5",
    context: Annotated[int, options.number(min=1, help="Tokens before the traced ones.")] = 96,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    output: bench_options.AppendEach = None,
    commit: options.Commit = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Trace when the kernels of a layer start, wait and end, on a GPU.

    Example: [b]cats bench timeline mistral-7b -o results.jsonl[/b]
    """
    import torch

    from cats.benchmarks.timeline import measure
    from cats.errors import ConfigError
    from cats.report.timeline import panels, table

    options.check_output(output)
    torch.manual_seed(0)
    targets = [bench_options.share_of(part) for part in sparsity.split(",")]
    if options.torch_device(device).type != "cuda":
        raise ConfigError(f"a timeline is of kernels on a CUDA device, got --device {device}")
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, blocks = bench_options.model_and_text(model, dtype, device, 32, max(256, context), hub)
    with options.err.status("tracing ..."):
        measured = measure(
            loaded, blocks, name=model, sparsities=targets, context=context, commit=commit
        )
        results = list(bench_options.append_each(output, measured))
    for panel in panels(results):
        options.out.print(table(panel).rich())
