"""``cats bench``: time the operator and whole models, and show what a results file holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats.cli import options

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cats.results import Result

_ModelOrShape = Annotated[
    str,
    typer.Argument(
        help="A folder, a Hugging Face id, [b]smollm2[/b]; or for random weights "
        "mistral-7b, llama-2-7b, llama-3.2-1b."
    ),
]
_Targets = Annotated[str, typer.Option(help="Targets of CATS, by commas; 0 is the dense model.")]
_AppendEach = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Append each result to this file when it is known."),
]

app = typer.Typer(help="Time the gated MLP and decoding; show results.", no_args_is_help=True)


@app.command()
def mlp(
    shape: Annotated[
        list[str], typer.Option(help="Hidden x intermediate size, such as 4096x14336; repeatable.")
    ],
    sparsity: Annotated[str, typer.Option(help="Shares of dropped neurons.")] = "0,0.5,0.7,0.9",
    dtype: Annotated[str, typer.Option(help="One or more, by commas.")] = "bfloat16",
    batch: Annotated[str, typer.Option(help="Tokens, one or more numbers by commas.")] = "1",
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; also [b]paper[/b]. Default: all that are live."),
    ] = None,
    device: options.Device = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the results to this file.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timed passes of each variant.")] = 50,
    read_mib: Annotated[
        int, typer.Option(min=1, help="Size of the read that gives the memory limit.")
    ] = 4096,
    compiled: Annotated[bool, typer.Option(help="Time torch.compile's dense MLP too.")] = True,
    commit: options.Commit = None,
) -> None:
    """Time one call of the gated MLP beside every dense one and the memory limit.

    Example: [b]cats bench mlp --shape 4096x14336 --shape 4096x11008 -o results.jsonl[/b]

    Lists multiply into a sweep. A kernel that is wrong is not timed.
    """
    from cats.benchmarks.mlp import Case, measure
    from cats.benchmarks.mlp_report import panels, table
    from cats.cli.running import stage
    from cats.results import append_results

    options.check_output(output)
    device = str(options.torch_device(device))
    cases = [
        Case(
            hidden_size=sizes[0], intermediate_size=sizes[1], dtype=_dtype(name),
            batch=_number(tokens, "--batch"), device=device, rounds=rounds,
            sparsities=tuple(_share(part) for part in sparsity.split(",")),
            backends=tuple(backend or ()), size=read_mib * 2**20, compiled=compiled,
        )
        for sizes, name, tokens in product(
            map(_shape, shape), dtype.split(","), batch.split(",")
        )
    ]  # fmt: skip
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
            options.out.print(table(panel))


@app.command()
def model(
    shape: Annotated[str, typer.Option(help="mistral-7b, llama-2-7b, llama-3.2-1b, ...")],
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than it has.")] = None,
    sparsity: Annotated[float, typer.Option(help="Target sparsity, inside (0, 1).")] = 0.5,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "bfloat16",
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the timed prompt.")] = 2048,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    cache: Annotated[str, typer.Option(help="Caches of generate, by commas.")] = "dynamic,static",
    device: options.Device = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the results to this file.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timed runs of each variant.")] = 5,
) -> None:
    """Time prefill and model.generate of a whole model with random weights.

    Example: [b]cats bench model --shape mistral-7b --layers 8 -o results.jsonl[/b]
    """
    from rich.table import Table

    from cats.benchmarks.model import Case, measure
    from cats.cli.running import stage
    from cats.config import label_of
    from cats.results import append_results

    options.quiet()
    options.check_output(output)
    case = Case(
        shape=shape, layers=layers, sparsity=sparsity, dtype=_dtype(dtype), prefill=prefill,
        new_tokens=new_tokens, caches=tuple(cache.split(",")), rounds=rounds,
        device=str(options.torch_device(device)),
    )  # fmt: skip
    with stage() as show:
        show(f"timing {shape}, dense and {label_of('cats', sparsity)}")
        results = list(measure(case))
    if output is not None:
        append_results(output, results)
    table = Table(title=f"{shape}, {results[0].settings['layers']} layers, {dtype}")
    for column in ("quantity", "cache", "variant", "median", "quartiles", "unit"):
        table.add_column(column)
    for r in results:
        table.add_row(
            r.quantity, str(r.settings.get("cache", "")), str(r.settings["variant"]),
            f"{r.value:.2f}", f"{r.low:.2f}-{r.high:.2f}", r.unit,
        )  # fmt: skip
    options.out.print(table)


@app.command()
def decode(
    model: _ModelOrShape = "smollm2",
    sparsity: _Targets = "0,0.5,0.7",
    engine: Annotated[
        list[str] | None, typer.Option(help="Of the decode loop, such as auto; repeatable.")
    ] = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=3, help="Tokens to generate.")] = 128,
    rounds: Annotated[int, typer.Option(min=2, help="Runs of each engine, in turns.")] = 5,
    generate_rounds: Annotated[
        int, typer.Option(min=2, help="Runs of model.generate.", rich_help_panel="Beside the loop")
    ] = 2,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="For the thresholds.")] = 8192,
    read_mib: Annotated[
        int, typer.Option(min=1, help="Size of the read that gives the memory limit.")
    ] = 4096,
    generate: Annotated[
        bool,
        typer.Option(
            help="Time model.generate beside the loop.", rich_help_panel="Beside the loop"
        ),
    ] = True,
    static: Annotated[
        bool,
        typer.Option(
            help="Time generate with a static cache and compilation too.",
            rich_help_panel="Beside the loop",
        ),
    ] = False,
    launches: Annotated[
        bool,
        typer.Option(
            help="List the kernels of a step, from a run of its own; on a GPU.",
            rich_help_panel="Beside the loop",
        ),
    ] = False,
    output: _AppendEach = None,
    commit: options.Commit = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time a token of dense and CATS models: the decode loop, transformers, the byte limit.

    Example: [b]cats bench decode smollm2 --dtype float32 -o results.jsonl[/b]
    """
    import torch

    from cats.benchmarks.decode import Case, measure
    from cats.benchmarks.decode_report import LEGEND, panels, tables
    from cats.cli.running import stage

    options.check_output(output)
    torch.manual_seed(0)
    case = Case(
        model=model, sparsities=tuple(_share(part) for part in sparsity.split(",")),
        engines=tuple(engine or ("auto",)), batch=batch, prompt_length=prompt_length,
        new_tokens=new_tokens, rounds=rounds, generate_rounds=generate_rounds,
        read_bytes=read_mib * 2**20, generate=generate, generate_compiled=static,
        launches=launches,
    )  # fmt: skip
    length = max(256, prompt_length + new_tokens)
    count = max(batch, -(-calibration_tokens // length))
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, blocks = _model_and_text(model, dtype, device, count, length, hub)
    with stage() as show:
        measured = measure(loaded, blocks, case, commit=commit, on_stage=show)
        results = list(_append_each(output, measured))
    for panel in panels(results):
        for table in tables(panel):
            options.out.print(table)
    _print_legend(LEGEND)


def _append_each(output: Path | None, results: Iterable[Result]) -> Iterator[Result]:
    """Passes results on, each once it is in the file, if there is one."""
    from cats.results import append_results

    for result in results:
        if output is not None:
            append_results(output, [result])
        yield result


def _model_and_text(
    model: str, dtype: options.Dtype, device: str, count: int, length: int, hub: dict[str, Any]
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
        loaded = random_model(model, _dtype(name), options.torch_device(device))
        return loaded, torch.randint(0, SHAPES[model]["vocab_size"], (count, length))
    loaded, tokenizer = options.load(model, dtype=dtype, device=device, dense=True, hub=hub)
    with options.err.status("reading the text ..."):
        return loaded, token_blocks(tokenizer, sample_text(), length=length, limit=count)


@app.command()
def timeline(
    model: _ModelOrShape = "smollm2",
    sparsity: _Targets = "0,0.5",
    context: Annotated[int, typer.Option(min=1, help="Tokens in front of those traced.")] = 96,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    output: _AppendEach = None,
    commit: options.Commit = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Trace the kernels of a layer of the stream engine on a GPU: who waits for whom, how long.

    Example: [b]cats bench timeline mistral-7b -o results.jsonl[/b]
    """
    import torch

    from cats.benchmarks.timeline import measure
    from cats.benchmarks.timeline_report import panels, table
    from cats.errors import ConfigError

    options.check_output(output)
    torch.manual_seed(0)
    targets = [_share(part) for part in sparsity.split(",")]
    if options.torch_device(device).type != "cuda":
        raise ConfigError(f"a timeline is of kernels on a CUDA device, got --device {device}")
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, blocks = _model_and_text(model, dtype, device, 32, max(256, context), hub)
    with options.err.status("tracing ..."):
        measured = measure(
            loaded, blocks, name=model, sparsities=targets, context=context, commit=commit
        )
        results = list(_append_each(output, measured))
    for panel in panels(results):
        options.out.print(table(panel))


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="What cats bench mlp, decode or timeline wrote.")],
) -> None:
    """Print the tables of a results file."""
    from cats.benchmarks import decode, decode_report, mlp, mlp_report, timeline_report

    results, found = _times(file)
    for layer in timeline_report.panels(results):
        options.out.print(timeline_report.table(layer))
    if mlp.NAME in found:
        for panel in mlp_report.panels(results):
            options.out.print(mlp_report.table(panel))
    if decode.NAME in found:
        for tokens in decode_report.panels(results):
            for table in decode_report.tables(tokens):
                options.out.print(table)
        _print_legend(decode_report.LEGEND)


@app.command()
def join(
    files: Annotated[list[Path], typer.Argument(help="Results of cats bench, in this order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File that is written anew.")],
) -> None:
    """Put results files together: checked, each result once, with the run that it is of.

    Example: [b]cats bench join OUT/decode-*.jsonl -o decode.jsonl[/b]
    """
    from cats.results import join_results, run_of
    from cats.storage import replacing

    options.check_output(output)
    results = join_results(files)
    with replacing(output) as temporary:
        temporary.write_text("".join(result.to_json() + "\n" for result in results), "utf-8")
    runs = len({run_of(result) for result in results})
    options.out.print(f"wrote {output}: {len(results)} results of {runs} runs", markup=False)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="What cats bench mlp, decode or timeline wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture, .svg or .png.")],
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Of MLPs, only these shapes, calls chained; repeatable."),
    ] = None,
    prompt_length: Annotated[
        int | None,
        typer.Option(help="Of tokens, only those behind one prompt of this length."),
    ] = None,
) -> None:
    """Draw the time of an MLP, or tokens a second, against sparsity; or the timeline of a layer."""
    from cats.benchmarks import (
        decode,
        decode_report,
        mlp,
        mlp_report,
        timeline,
        timeline_report,
    )
    from cats.errors import ConfigError, DataError
    from cats.storage import replacing

    options.check_output(output)
    if output.suffix not in (".svg", ".png"):
        raise ConfigError(f"{output}: name a picture .svg or .png")
    results, found = _times(file)
    if len(found) > 1:
        raise DataError(
            f"{file} holds results of {' and '.join(sorted(found))}: a picture is of one of them"
        )
    if shape and found != {mlp.NAME}:
        raise ConfigError("--shape is for results of cats bench mlp")
    if prompt_length is not None and found != {decode.NAME}:
        raise ConfigError("--prompt-length is for results of cats bench decode")
    draw: Callable[[Path], None]
    if timeline.NAME in found:
        draw = partial(timeline_report.plot, timeline_report.panels(results))
    elif decode.NAME in found:
        tokens = [
            panel
            for panel in decode_report.panels(results)
            if prompt_length is None or (panel.batch, panel.prompt_length) == (1, prompt_length)
        ]
        if not tokens:
            raise DataError(f"{file} has no results of one prompt of {prompt_length} tokens")
        draw = partial(decode_report.plot, tokens)
    else:
        wanted = [_shape(text) for text in shape or []]
        calls = [
            panel
            for panel in mlp_report.panels(results)
            if not wanted
            or (
                panel.neighbour == "none"
                and panel.batch == 1
                and (panel.hidden_size, panel.intermediate_size) in wanted
            )
        ]
        if not calls:
            raise DataError(f"{file} has no results of {', '.join(shape or [])}")
        draw = partial(mlp_report.plot, calls)
    with replacing(output) as temporary:
        draw(temporary)
    options.out.print(f"wrote {output}", markup=False)


@app.command()
def quote(
    documents: Annotated[list[Path], typer.Argument(help="Markdown files that quote results.")],
    check: Annotated[bool, typer.Option(help="Only complain where a table differs.")] = False,
) -> None:
    """Make the tables in documents anew from the results files that they name.

    Example: [b]cats bench quote README.md --check[/b]
    """
    from cats.benchmarks.quotes import requote
    from cats.errors import DataError, StorageError
    from cats.storage import replacing

    for document in documents:
        if not document.is_file():
            raise StorageError(f"{document}: no such file")
        text, old = requote(document), document.read_text(encoding="utf-8")
        if text == old:
            continue
        if check:
            differing = zip_longest(old.split("\n"), text.split("\n"), fillvalue="")
            line, (said, wanted) = next(
                (number, pair) for number, pair in enumerate(differing, 1) if pair[0] != pair[1]
            )
            raise DataError(
                f"{document}, line {line}, does not say what its results file says; "
                f"cats bench quote {document} mends that:\n- {said}\n+ {wanted}"
            )
        with replacing(document) as temporary:
            temporary.write_text(text, encoding="utf-8")
        options.out.print(f"wrote {document}", markup=False)


def _times(file: Path) -> tuple[list[Result], set[str]]:
    """Results of a file, and which of these benchmarks they are of."""
    from cats.benchmarks import decode, mlp, timeline
    from cats.errors import DataError
    from cats.results import read_results

    results = read_results(file)
    found = {result.benchmark for result in results} & {mlp.NAME, decode.NAME, timeline.NAME}
    if not found:
        raise DataError(f"{file} has no result of cats bench mlp, decode or timeline")
    return results, found


def _print_legend(text: str) -> None:
    options.out.print(text.replace("\n", " "), style="dim", highlight=False)


def _shape(text: str) -> tuple[int, int]:
    hidden, _, intermediate = text.partition("x")
    return _number(hidden, "--shape"), _number(intermediate, "--shape")


def _number(text: str, option: str) -> int:
    from cats.errors import ConfigError

    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option}: expected a positive number, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    from cats.errors import ConfigError

    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--sparsity: expected numbers by commas, got {text!r}") from error


def _dtype(name: str) -> torch.dtype:
    import torch

    from cats.errors import ConfigError

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise ConfigError(f"--dtype: expected {', '.join(known)}; got {name!r}")
    return known[name]
