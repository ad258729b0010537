"""Tables of quality: perplexity, bytes and zero-shot tasks of every variant in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from cats.errors import DataError
from cats.results import MEAN, Result, place, read_results


def read_quality(folder: Path) -> list[Result]:
    """What ``cats reproduce`` found of perplexity and tasks.

    Raises:
        DataError: If there is none of the dense model.
    """
    files = sorted((folder / "perplexity").glob("*.jsonl"))
    if (folder / "tasks.jsonl").exists():
        files.append(folder / "tasks.jsonl")
    found = [result for file in files for result in read_results(file)]
    if not any(result.settings["variant"] == "dense" for result in found):
        raise DataError(f"{folder} holds no results of the dense model: cats reproduce writes them")
    return found


def quality_table(found: list[Result]) -> str:
    """One row a variant: bytes, perplexity of each text, mean accuracy and its loss; then tasks."""
    perplexity = {
        (r.settings["variant"], r.settings["text"]): r for r in found if r.benchmark == "perplexity"
    }
    accuracy = {
        (r.settings["variant"], r.settings["task"]): r
        for r in found
        if r.benchmark == "tasks" and r.quantity == "acc"
    }
    variants = _ordered(found)
    texts = list(dict.fromkeys(text for _, text in perplexity))
    tasks = [t for t in dict.fromkeys(task for _, task in accuracy) if t != MEAN]
    first = found[0]
    about = first.settings
    begin = ", every block begun with a beginning-of-sequence token" if about.get("bos") else ""
    lines = [
        f"{about['model']}, {about['dtype']}, on {first.environment['device']}; calibrated on "
        f"{about['calibration_samples']} blocks of {about['calibration_length']} tokens of "
        f"{about['calibration_text']}, seed {about['calibration_seed']}{begin}; differences to "
        "dense are paired, ± one standard error",
        "",
    ]
    columns = ["MLP bytes read", *(f"perplexity of {_short(text)}" for text in texts)]
    has_mean = any(task == MEAN for _, task in accuracy)  # there is none of one task
    columns += [f"mean of {len(tasks)} tasks", "difference"] if has_mean else []
    lines += head("variant", columns)
    for variant in variants:
        of_texts = [perplexity.get((variant, text)) for text in texts]
        share = next((r.settings["mlp_share"] for r in of_texts if r is not None), None)
        cells = ["" if share is None else f"{float(share):.1%}"]
        cells += ["" if r is None else f"{r.value:.2f}" for r in of_texts]
        if has_mean:
            mean = accuracy.get((variant, MEAN))
            cells += ["", ""] if mean is None else [f"{mean.value:.2%}", _difference(mean)]
        lines.append(row(variant, cells))
    if tasks:
        lines += ["", *head("task (split, questions)", variants)]
        for task in tasks:
            dense = accuracy[variants[0], task]
            label = f"{task} ({dense.settings['split']}, {dense.samples:,})"
            scores = [accuracy.get((variant, task)) for variant in variants]
            lines.append(row(label, [_score(score) for score in scores]))
    return "\n".join(lines) + "\n"


def _ordered(found: Iterable[Result]) -> list[str]:
    """Names of the variants by method, then by target."""
    return list(dict.fromkeys(str(r.settings["variant"]) for r in sorted(found, key=place)))


def _short(text: object) -> str:
    """A text's name without the suffixes of its file."""
    return re.sub(r"\.(txt|jsonl?|parquet)(\.gz)?", "", str(text))


def _score(result: Result | None) -> str:
    if result is None:
        return ""
    difference = _difference(result)
    return f"{result.value:.1%}" + (f" ({difference})" if difference else "")


def _difference(result: Result) -> str:
    """In points; empty for the dense model."""
    if result.settings["variant"] == "dense":
        return ""
    difference = float(result.settings["difference"] or 0)
    error = result.settings["difference_stderr"]
    return f"{100 * difference:+.2f}" + ("" if error is None else f" ± {100 * float(error):.2f}")


def head(first: str, columns: list[str]) -> list[str]:
    """The two lines above rows of numbers that have a name each, in Markdown."""
    return [row(first, columns), "| --- |" + " ---: |" * len(columns)]


def row(first: str, cells: Iterable[str]) -> str:
    """One line of such a table."""
    return f"| {first} | " + " | ".join(cells) + " |"
