"""``cats lm-eval``: the command line of lm-evaluation-harness, with the model type ``cats``."""

from __future__ import annotations

import typer

_ABOUT = """\
cats lm-eval is lm-evaluation-harness with one more model type, --model cats: sparse models.
  --model_args pretrained=FOLDER                  a checkpoint of cats calibrate -o FOLDER
  --model_args pretrained=MODEL,thresholds=FILE   a dense model and its thresholds
All other arguments of --model hf are taken too. What follows is the harness's own help.
"""
SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with sparse models: its options, and [b]--model cats[/b].

    Example: [b]cats lm-eval --model cats --model_args pretrained=M,thresholds=F --tasks piqa[/b]
    """
    from cats.integrations.lm_eval import run

    if {"-h", "--help"} & set(context.args):
        typer.echo(_ABOUT)
    run(context.args)
