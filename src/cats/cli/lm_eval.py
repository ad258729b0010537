"""``cats lm-eval``: the command line of lm-evaluation-harness, with the model type ``cats``."""

from __future__ import annotations

import typer

SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with sparse models: its options, and [b]--model cats[/b].

    Example: [b]cats lm-eval --model cats --model_args pretrained=M,thresholds=F --tasks piqa[/b]
    """
    from cats.integrations.lm_eval import run

    run(context.args)
