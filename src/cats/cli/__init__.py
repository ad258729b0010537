"""The command ``cats``. Each command's file imports torch and transformers only when it runs."""

import sys

import typer

from cats.cli import (
    bench,
    bench_finetune,
    bench_peer,
    bench_results,
    bench_serve,
    bench_sessions,
    calibrate,
    demo,
    evaluate,
    export,
    families,
    finetune,
    generate,
    info,
    lm_eval,
    profile,
    quantize,
    report,
    reproduce,
    serve,
)
from cats.errors import CatsError

app = typer.Typer(
    help="Faster decoding of language models: skip the neurons that the gate of an MLP drops.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(demo.demo)
app.command()(calibrate.calibrate)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command()(families.families)
app.command()(finetune.finetune)
app.command()(generate.generate)
app.command()(info.info)
app.command()(profile.profile)
app.command()(quantize.quantize)
app.command()(report.report)
app.command()(reproduce.reproduce)
app.command()(serve.serve)
app.command("lm-eval", context_settings=lm_eval.SETTINGS, add_help_option=False)(lm_eval.lm_eval)

bench.app.command()(bench_finetune.finetune)
bench.app.command()(bench_peer.peer)
bench.app.command()(bench_sessions.sessions)
bench.app.command()(bench_serve.serve)
bench.app.add_typer(bench_results.app, name="results")
for name in ("curves", "join", "plot", "quote", "show"):
    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    bench.app.command(name, hidden=True, add_help_option=False, context_settings=anything)(
        bench_results.moved(name)
    )
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line; a user's mistake ends in one line, not in a traceback."""
    try:
        app()
    except CatsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
