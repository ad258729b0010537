"""The page that says what works for which family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transformers

from cats.families.check import Family

# Where the page is in the repository.
PAGE = Path("docs") / "families.md"
_COLUMNS = ("family", "sparsify_", "fuse_", "generate", "stream", "8 bits", "rows")


def page(families: Sequence[Family]) -> str:
    """The page in Markdown: counts, families that work, gated ones that do not, and the others."""
    gated = [family for family in families if family.is_gated]
    sparse = [family for family in gated if family.is_sparse]
    notes: dict[str, int] = {}
    rows = [_row(family, notes) for family in sparse]
    refused = [f"- `{f.model_type}`: {f.sparsify}." for f in gated if not f.is_sparse]
    unknown = [
        f"- `{f.model_type}`: {f.sparsify}."
        for f in families
        if not f.is_gated and f.sparsify != "it has no gate"
    ]
    ungated = [f"`{f.model_type}`" for f in families if f.sparsify == "it has no gate"]
    lines = [
        "# Families of transformers",
        "",
        "<!-- written by `cats families --output docs/families.md`; `make test-families` checks it "
        "-->",
        "",
        f"transformers {transformers.__version__} has {len(families)} causal families. "
        f"{len(gated)} of them have gates in their MLPs; `cats.sparsify_` makes {len(sparse)} of "
        f"these sparse, and `cats.fuse_` fuses {sum(f.is_fused for f in sparse)}. This page is "
        "written by `cats families`, which builds a tiny model of each family, finds its gates in "
        "the operators that run, and compares:",
        "",
        "- **sparsify_**: the sparse model with the plain one, whose activations are masked by "
        "hooks. Every gate has a threshold.",
        "- **fuse_**: the fused model with the same. The stacked experts of a mixture stay sparse, "
        "and are not fused.",
        "- **generate**: the tokens of `cats.generate` with those of transformers. A step is "
        "`traced`, or runs module by module.",
        "- **stream**: whether the engine `stream` can describe the model. On a GPU, a probe "
        "compares every layer before it is used.",
        "- **8 bits**: the sparse model with linear layers in 8 bits, with its plain one masked by "
        "hooks.",
        "- **rows**: whether sessions of several lengths decode together, as one step.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "| " + " | ".join("---" for _ in _COLUMNS) + " |",
        *rows,
        "",
        *(f"{number}. {note}" for note, number in notes.items()),
        "",
        f"## Gated, and refused ({len(refused)})",
        "",
        *refused,
        "",
        f"## Not tried ({len(unknown)})",
        "",
        *unknown,
        "",
        f"## Without gates ({len(ungated)})",
        "",
        ", ".join(ungated) + ".",
        "",
    ]
    return "\n".join(lines)


def _row(family: Family, notes: dict[str, int]) -> str:
    cells = (
        family.sparsify,
        family.fuse,
        family.engine,
        family.stream,
        family.quantised,
        family.rows,
    )
    return f"| `{family.model_type}` | " + " | ".join(_cell(cell, notes) for cell in cells) + " |"


def _cell(text: str, notes: dict[str, int]) -> str:
    """A short answer, or the number of a note below the table."""
    if text in ("yes", "traced", "module by module"):
        return text
    short = "yes" if text.startswith("yes, ") else "no"
    return f"{short} ({notes.setdefault(text.removeprefix('yes, '), len(notes) + 1)})"
