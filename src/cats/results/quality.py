"""Records of quality: perplexity and zero-shot tasks; and the times of a demo."""

from __future__ import annotations

from typing import Annotated, Literal

from cats.results.result import FOUND, Found, MayBeFound, ModelResult, Result

# Stands for a task in the mean over the tasks.
MEAN = "mean"
# Methods whose quality is compared, in the order of tables.
COMPARED = ("dense", "cats", "relu", "input", "teal", "neuron", "two-stage", "cascade")
# The method of a quantised model without thresholds.
QUANTISED = "quantised"


class _OfAModel(Result):
    """What the quality of one variant of a model depends on.

    Fields that older releases did not write may be missing. A command sets those ``calibration_*``
    that it knows.

    Attributes:
        variant: Its label, such as ``"cats-50"``.
        method: One of ``COMPARED``, ``QUANTISED``, or another one of :mod:`cats.methods`.
        target_sparsity: None for the dense model, for ReLU, and where ``target_bytes`` is given.
        target_bytes: Share of the bytes of masked layers that calibration aimed to read.
        weights: Hash of the dense weights by :mod:`cats.fingerprint`, which makes all hashes here.
            That of the 16-bit model, also where the variant is a quantised one.
        quantised: Name of the quantised model, such as ``"int4"``; None for the 16-bit one.
        bits: Of the codes of most weights; None for the 16-bit model.
        group_size: Columns that share a scale; None for a scale per row.
        codes: Hash of the quantised model.
    """

    limit: int | None = None
    seed: int | None = None
    model: str
    dtype: str
    weights: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    calibration_text: str | None = None
    calibration_samples: int | None = None
    calibration_length: int | None = None
    calibration_seed: int | None = None
    bos: bool | None = None
    method: str
    target_sparsity: float | None
    target_bytes: float | None = None
    calibration_tokens: int | None = None
    calibration_hash: str | None = None
    thresholds: str | None = None
    quantised: str | None = None
    bits: int | None = None
    group_size: int | None = None
    codes: str | None = None
    harness: str | None = None
    data: str | None = None
    variant: str

    @property
    def order(self) -> tuple[str, int, str, float]:
        """What tables are sorted by: the weights, 16 bits first, then the method and its target.

        The one that skips least comes first.
        """
        ranks = {QUANTISED: 0} | {method: rank for rank, method in enumerate(COMPARED)}
        rank = ranks.get(self.method, len(COMPARED))
        skipped = self.target_sparsity or 0.0
        if self.target_bytes is not None:
            skipped = 1 - self.target_bytes
        return self.quantised or "", rank, self.method, skipped

    @property
    def family(self) -> str:
        """The method, and which weights it runs on: variants of one line in a plot."""
        return self.method if self.quantised is None else f"{self.quantised}, {self.method}"

    @property
    def hashes(self) -> tuple[str, ...]:
        """They tell models and texts of one name apart; older results have none."""
        hashes = (self.weights, self.tokenizer, getattr(self, "text_hash", None))
        return tuple(name for name in hashes if name)


class Perplexity(_OfAModel):
    """Perplexity of one text. It is measured once: ``low`` and ``high`` are the value.

    Attributes:
        tokens: Tokens of the text, in blocks of ``block`` tokens.
        realized_sparsity: Mean share of dropped neurons; None where no neurons are dropped.
        mlp_share: Share of the MLPs' weights that a token reads.
        token_bytes: Bytes of all weights that a token reads.
        loss_difference: Difference from the dense model of the mean negative log-likelihood of a
            token; None where no dense model was measured beside it.
        loss_difference_stderr: Standard error of the paired differences, block by block.
    """

    benchmark: Literal["perplexity"] = "perplexity"
    quantity: Literal["perplexity"] = "perplexity"
    unit: Literal[""] = ""
    text: str
    tokens: int
    block: int
    text_hash: str | None = None
    realized_sparsity: MayBeFound = None
    mlp_share: Found
    token_bytes: Annotated[int, FOUND]
    loss_difference: MayBeFound = None
    loss_difference_stderr: MayBeFound = None


class TaskScore(_OfAModel):
    """Mean of a metric (``quantity``) over the questions of a task, or over the tasks.

    ``low`` and ``high`` lie one standard error beside it; ``samples`` is the number of questions.

    Attributes:
        task: Its name; ``MEAN`` is the mean over the tasks.
        split: Split of its data; empty for a mean.
        stderr: The standard error; None where one question was asked.
        difference: Difference from the dense model, in the unit of the value.
        difference_stderr: Standard error of the paired differences.
    """

    benchmark: Literal["tasks"] = "tasks"
    unit: Literal["share"] = "share"
    task: str
    split: str
    stderr: MayBeFound = None
    difference: Found
    difference_stderr: MayBeFound = None


class DemoTime(ModelResult):
    """One token of a demo through one loop (``variant``), dense at sparsity 0.

    Attributes:
        model_variant: Label of what ran, such as ``"dense"`` or ``"cats-50"``; older files tell it
            by the sparsity alone.
    """

    benchmark: Literal["demo"] = "demo"
    quantity: Literal["time"] = "time"
    unit: Literal["ms"] = "ms"
    seed: int
    calibration_tokens: int
    variant: str
    model_variant: str | None = None
    sparsity: float
    realized_sparsity: Found
    prompt: str

    @property
    def ran(self) -> str:
        """Label of what ran."""
        if self.model_variant is not None:
            return self.model_variant
        return f"cats-{self.sparsity * 100:g}" if self.sparsity else "dense"

    @property
    def limit(self) -> None:
        """A demo does not measure how fast the memory is read."""
        return None
