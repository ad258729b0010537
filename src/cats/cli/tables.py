"""The tables that commands print, and words that stand in several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cats.config import label_of
from cats.history import names_of, recovered
from cats.report.page_tables import difference as difference_cell
from cats.report.page_tables import score as score_cell
from cats.report.tables import Table, cell

if TYPE_CHECKING:
    from cats.evaluation.profile import Profile
    from cats.history import History
    from cats.recipes.demo_results import Demonstration
    from cats.recipes.evaluation import Perplexities
    from cats.recipes.quantisation import Quantisation
    from cats.results import TaskScore

_BAR_WIDTH = 20


def bar(share: float) -> str:
    """A share in [0, 1] as a bar of blocks."""
    eighths = round(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def loss(dense: float, sparse: float) -> str:
    """How much a perplexity rises, in percent."""
    return f"{sparse / dense - 1:+.1%}"


def _mean(shares: Mapping[str, float]) -> float:
    return sum(shares.values()) / len(shares)


def field_table(title: str, values: Mapping[str, object]) -> Table:
    """One row per name and value, without a header."""
    rows = [[name, _word(value)] for name, value in values.items()]
    return Table(title=title, columns=("", ""), rows=rows, names=2, wrap=True)


def _word(value: object) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def layer_table(thresholds: Mapping[str, float], realized: Mapping[str, float]) -> Table:
    """One row per sparse MLP: its threshold and the share of neurons that it drops."""
    return Table(
        title="realised sparsity on held-out text",
        columns=("MLP", "threshold", "dropped", ""),
        rows=[
            [name, f"{thresholds[name]:.4f}", f"{share:.1%}", bar(share)]
            for name, share in realized.items()
        ],
        total=("mean", "", f"{_mean(realized):.1%}", bar(_mean(realized))),
        bars=True,
    )


def perplexity_table(title: str, measured: Perplexities) -> Table:
    """One row for the dense model, and one for the sparse model where there is one."""
    dense = f"{measured.dense:.3f}"
    if measured.sparse is None or measured.method is None:
        return Table(title=title, columns=("model", "perplexity"), rows=[["dense", dense]])
    sparse = [
        label_of(measured.method, measured.target_sparsity, measured.target_bytes),
        f"{_mean(measured.realized_sparsity):.1%}",
        f"{measured.sparse:.3f}",
        loss(measured.dense, measured.sparse),
    ]
    columns = ("model", "realised sparsity", "perplexity", "change")
    return Table(title=title, columns=columns, rows=[["dense", "", dense, ""], sparse])


def quantisation_table(title: str, quantisation: Quantisation) -> Table:
    """One row for the model before, and one for each step: layers, then the head."""
    first = quantisation.steps[0]
    rows = []
    for step in quantisation.steps:
        change = value = ""
        if step.perplexity is not None and first.perplexity is not None:
            value = f"{step.perplexity:.3f}"
            change = "" if step is first else f"{step.perplexity / first.perplexity - 1:+.2%}"
        name = {
            "before": "before",
            "layers": f"{step.layers} layers ({quantisation.method})",
            "head": "and the head (rtn)",
        }[step.name]
        sizes = [f"{size / 1e6:,.1f}" for size in (step.bytes, step.token_bytes)]
        rows.append([name, step.kind, *sizes, value, change])
    columns = ("model", "weights", "MB", "MB, per token", "perplexity", "change")
    return Table(title=title, columns=columns, rows=rows)


def task_table(title: str, scores: Sequence[TaskScore]) -> Table:
    """One row per task and metric, one column per variant, each with its standard error.

    The difference to the dense model has the error of the paired differences.
    """
    variants = dict.fromkeys(score.variant for score in scores)
    columns = ["task", "metric", "questions"]
    for variant in variants:
        columns += [variant] if variant == "dense" else [variant, "difference"]
    rows: dict[tuple[str, str], list[str]] = {}
    # results come variant by variant, so each appends its cells to the row
    for score in scores:
        key = (score.task, score.quantity)
        row = rows.setdefault(key, [*key, f"{score.samples:,}"])
        row.append(score_cell(score))
        if score.variant != "dense":
            row.append(difference_cell(score))
    splits = {score.task: score.split for score in scores if score.split}
    notes = ["splits: " + ", ".join(f"{task} {split}" for task, split in splits.items())]
    if sparse := next((score for score in scores if score.calibration_tokens), None):
        tokens = f"{sparse.calibration_tokens:,}"
        notes.append(f"calibrated on {tokens} tokens (hash {sparse.calibration_hash})")
    return Table(
        title=title, columns=columns, rows=[*rows.values()], names=2, caption="\n".join(notes)
    )


def speed_table(demonstration: Demonstration) -> Table:
    """One row per model: bytes, quality and speed, each beside that of the dense model."""
    dense = demonstration.dense
    return Table(
        columns=("model", "MB per token", "perplexity", "change", "tokens/s", "speed"),
        rows=[
            [
                label,
                f"{side.token_bytes / 1e6:.0f}",
                f"{side.perplexity:.2f}",
                "" if side is dense else loss(dense.perplexity, side.perplexity),
                f"{side.tokens_per_second:.1f}",
                "" if side is dense else f"{side.tokens_per_second / dense.tokens_per_second:.2f}x",
            ]
            for label, side in demonstration.sides.items()
        ],
    )


def evaluation_table(title: str, history: History) -> Table:
    """One row per evaluation of one fine-tuning."""
    names, _ = names_of([history])
    notes = ["losses are log-perplexities"]
    for name, share in history.points[-1].accuracy.items() if history.points else ():
        notes.append(f"{name}: {share:.1%} of the answers right")
    return Table(
        title=title,
        columns=("step", "tokens", "train", *names, "dropped", "s per step"),
        rows=[
            [
                str(point.step),
                f"{point.tokens:,}",
                cell(point.train_loss, ".4f"),
                *(cell(point.losses.get(name), ".4f") for name in names),
                cell(point.sparsity, ".1%"),
                cell(point.seconds_per_step, ".3f"),
            ]
            for point in history.points
        ],
        names=0,
        caption="; ".join(notes),
    )


def run_table(title: str, histories: Mapping[str, History]) -> Table:
    """One row per run, with the share of the sparse model's loss that it recovers.

    The loss is counted against the lower of the untuned dense model and the best dense run.
    """
    names, questions = names_of(histories.values())
    rows = []
    for run, history in histories.items():
        first, last = history.points[0], history.points[-1]
        row = [run]
        for name in names:
            share = recovered(history, histories.values(), name)
            before, after = (cell(p.losses.get(name), ".4f") for p in (first, last))
            row.append(f"{before} > {after}" + ("" if share is None else f" ({share:.0%})"))
        row += [cell(last.accuracy.get(name), ".1%") for name in questions]
        rows.append([*row, cell(last.sparsity, ".1%"), cell(last.seconds_per_step, ".3f")])
    return Table(
        title=title,
        columns=("run", *names, *(f"{q}, right" for q in questions), "dropped", "s per step"),
        rows=rows,
        wrap=True,
        caption="log-perplexity before > after (recovered share of the loss against dense)",
    )


def activation_table(title: str, profile: Profile) -> Table:
    """One row per activation module: shares of zeros, and how tokens share them."""
    unions = sorted({count for layer in profile.layers for count in layer.union})
    return Table(
        title=title,
        columns=("MLP", "zero", f"< {profile.near:g}", *(f"by {n}" for n in unions), "again"),
        rows=[
            [
                layer.name.rpartition(".")[0],
                f"{layer.zero:.1%}",
                f"{layer.near_zero:.1%}",
                *(cell(layer.union.get(count), ".1%") for count in unions),
                cell(layer.overlap, ".1%"),
            ]
            for layer in profile.layers
        ],
        wrap=True,
        caption="by 2, 4, 8: zero for all of 2, 4 or 8 tokens of different texts; again: share of "
        "the nonzero neurons that were nonzero for the token before, too",
    )
