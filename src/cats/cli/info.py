"""``cats info``: what is installed, and what a model or thresholds file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cats.cli import options


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a Hugging Face id, [b]smollm2[/b], or a thresholds file.",
            show_default="this installation",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Versions and backends of this installation, or what a model or thresholds file holds.

    Example: [b]cats info cats50.safetensors[/b]
    """
    options.quiet()
    report = _installation() if model is None else _describe(model)
    if as_json:
        options.print_json(report)
        return
    from rich.markup import escape
    from rich.table import Table

    for title, rows in report.items():
        table = Table(title=escape(title), title_justify="left", show_header=False)
        for name, value in rows.items():
            table.add_row(name, escape(_word(value)))
        options.out.print(table)


def _installation() -> dict[str, dict[str, Any]]:
    import platform

    import torch
    import transformers

    from cats import ops
    from cats.version import __version__

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "cats": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "devices": {
            "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            "gpu": ", ".join(gpus) or "none",
        },
        "backends of cats::gated_mlp": dict(ops.backends()),
    }


def _describe(model: str) -> dict[str, dict[str, Any]]:
    from cats.checkpoint import is_sparse_checkpoint, read_config
    from cats.config import CatsConfig

    if model.endswith(".safetensors"):
        config = CatsConfig.load(model)
    else:
        path = options.resolve(model)
        if not is_sparse_checkpoint(path):
            return {Path(model).name: {"thresholds": "none: a dense model"}}
        config = read_config(path)
    block = config.to_dict()
    realized = block.pop("realized_sparsity")
    thresholds = {
        name: f"threshold {float(t.mean()):.4f}"
        + (f", {realized[name]:.1%} dropped in calibration" if name in realized else "")
        for name, t in config.thresholds.items()
    }
    return {Path(model).name: block, "MLPs": thresholds}


def _word(value: Any) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
