"""The model card of a sparse checkpoint: what was calibrated on what, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cats.errors import StorageError
from cats.version import __version__

NAME = "README.md"
# By this, a card of ours is told from one that somebody wrote, which stays.
_MARK = "<!-- written by cats -->"


def write_card(
    folder: str | Path, block: Mapping[str, Any], *, base: str = "", facts: Mapping[str, str] = {}
) -> None:
    """Write the card of a sparse checkpoint, unless another hand wrote one.

    Args:
        folder: Of the checkpoint.
        block: The ``cats`` block of its configuration.
        base: Name of the dense model, if it is known.
        facts: What was measured, such as ``{"perplexity": "12.3"}``; each is one line.

    Raises:
        StorageError: If it cannot be written.
    """
    path = Path(folder) / NAME
    try:
        if path.is_file() and _MARK not in path.read_text("utf-8"):
            return
        path.write_text(card(block, base=base, facts=facts), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error


def card(block: Mapping[str, Any], *, base: str = "", facts: Mapping[str, str] = {}) -> str:
    """The card in Markdown, with the metadata that the Hugging Face hub reads."""
    shares = [float(share) for share in block["realized_sparsity"].values()]
    target = block["target_sparsity"]
    is_on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- cats",
        "- sparse",
        *([f"base_model: {base}"] if is_on_hub else []),
        "---",
        "",
        _MARK,
        "",
        f"# {Path(base).name or 'A model'}, sparse",
        "",
        "The weights of this checkpoint are those of the dense model. Beside them lie thresholds: "
        "a neuron of a gated MLP whose activation is smaller is dropped, so that a decoded token "
        "reads fewer weights ([CATS](https://arxiv.org/abs/2404.08763)).",
        "",
        "|  |  |",
        "| --- | --- |",
        f"| method | {block['method']} |",
        f"| target sparsity | {'none' if target is None else f'{target:.0%}'} |",
    ]
    if shares:
        mean = sum(shares) / len(shares)
        lines.append(
            f"| dropped on the calibration text | {mean:.1%} of the neurons in {len(shares)} MLPs "
            f"({min(shares):.1%} to {max(shares):.1%}) |"
        )
    lines += [
        f"| calibration text | {block['calibration_tokens']:,} tokens, hash "
        f"`{block['calibration_hash']}` |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        f"| written by | cats {__version__} |",
        "",
        "## Load it",
        "",
        "```python",
        "import cats",
        "",
        'model = cats.from_pretrained("THIS_MODEL")',
        "cats.fuse_(model)  # where a kernel computes its MLPs: decodes faster",
        "```",
        "",
        "Or let transformers apply the thresholds itself, in pipelines and other libraries too:",
        "",
        "```python",
        "import cats",
        "from transformers import AutoModelForCausalLM",
        "",
        "cats.register()",
        'model = AutoModelForCausalLM.from_pretrained("THIS_MODEL")',
        "```",
        "",
        "Without cats, transformers loads the dense model and reports the thresholds as unexpected "
        "tensors.",
        "",
    ]
    return "\n".join(lines)
