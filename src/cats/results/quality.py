"""Records of quality: perplexity and zero-shot tasks; and the times of a demo."""

from __future__ import annotations

from typing import Annotated, Literal

from cats.results.result import FOUND, Found, MayBeFound, Result

# Stands for a task in the mean over the tasks.
MEAN = "mean"
# Methods whose quality is compared, in the order of tables.
COMPARED = ("dense", "cats", "relu", "input", "teal")


class _OfAModel(Result):
    """What the quality of one variant of a model depends on.

    Fields that older releases did not write may be missing. Of ``calibration_*`` those are set that
    the command knows.

    Attributes:
        variant: Its label, such as ``"cats-50"``.
        method: One of ``COMPARED``, or another one of :mod:`cats.methods`.
        target_sparsity: None for the dense model and for ReLU.
        weights: Hash of the dense weights, as the other hashes by :mod:`cats.fingerprint`.
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
    calibration_tokens: int | None = None
    calibration_hash: str | None = None
    thresholds: str | None = None
    harness: str | None = None
    data: str | None = None
    variant: str

    @property
    def order(self) -> tuple[int, str, float]:
        """What tables are sorted by: the method, then its target."""
        known = COMPARED.index(self.method) if self.method in COMPARED else len(COMPARED)
        return known, self.method, self.target_sparsity or 0.0

    @property
    def hashes(self) -> tuple[str, ...]:
        """Tell models and texts of one name apart; older results have none."""
        found = (self.weights, self.tokenizer, getattr(self, "text_hash", None))
        return tuple(each for each in found if each)


class Perplexity(_OfAModel):
    """Of one text. ``low`` and ``high`` are the value: it is measured once.

    Attributes:
        tokens: Of the text, in blocks of ``block`` tokens.
        realized_sparsity: Mean share of dropped neurons; None where no neurons are dropped.
        mlp_share: Of the MLPs' weights that a token reads.
        token_bytes: All that a token reads.
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


class TaskScore(_OfAModel):
    """Mean of a metric (``quantity``) over the questions of a task, or over the tasks.

    ``low`` and ``high`` lie one standard error beside it; ``samples`` is the number of questions.

    Attributes:
        task: Its name; ``MEAN`` is the mean over the tasks.
        split: Of its data; empty for a mean.
        stderr: The standard error; None where one question was asked.
        difference: To the dense model, in the unit of the value, with the error of the paired
            differences.
    """

    benchmark: Literal["tasks"] = "tasks"
    unit: Literal["share"] = "share"
    task: str
    split: str
    stderr: MayBeFound = None
    difference: Found
    difference_stderr: MayBeFound = None


class DemoTime(Result):
    """One token of a demo through one loop (``variant``), dense at sparsity 0."""

    benchmark: Literal["demo"] = "demo"
    quantity: Literal["time"] = "time"
    unit: Literal["ms"] = "ms"
    model: str
    dtype: str
    seed: int
    calibration_tokens: int
    variant: str
    sparsity: float
    realized_sparsity: Found
    prompt: str

    @property
    def limit(self) -> None:
        """A demo does not measure how fast the memory is read."""
        return None
