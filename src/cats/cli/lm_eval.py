"""``cats lm-eval``: the command line of lm-evaluation-harness, with the model type ``cats``."""

from __future__ import annotations

import typer

_ABOUT = """\
cats lm-eval is lm-evaluation-harness with one more model type, --model cats: sparse models.
  --model_args pretrained=FOLDER                  a checkpoint of cats calibrate -o FOLDER
  --model_args pretrained=MODEL,thresholds=FILE   a dense model and its thresholds
  pretrained   a folder, a Hugging Face id, or smollm2 for the model of the demo
  thresholds   a file of cats calibrate -o FILE.safetensors; none for a sparse checkpoint
All other arguments of --model hf work too, such as dtype=bfloat16. revision, subfolder, token,
cache_dir, local_files_only and trust_remote_code apply to every file, also to the thresholds.
The harness's own help:
"""
SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with sparse models: [b]--model cats[/b].

    Example: [b]cats lm-eval --model cats --model_args pretrained=M,thresholds=F --tasks piqa[/b]
    """
    from cats.integrations.lm_eval import run

    if {"-h", "--help"} & set(context.args):
        typer.echo(_ABOUT)
    run(context.args)
