"""The results of a demo: numbers of the dense model and of sparse ones, records, and a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from cats.evaluation.profile import Profile
from cats.recipes.evaluation import write_results
from cats.recipes.generation import Answer
from cats.results import DemoTime, Perplexity, Result, environment

# The name of the model without thresholds.
DENSE = "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Measurements of the dense model, or of a sparse one.

    Attributes:
        perplexity: Perplexity on the held-out text.
        mlp_share: Share of the MLPs' weights that a token reads.
        token_bytes: Bytes that a token reads.
        answer: The first answer of ``cats.generate`` to the prompt.
        rounds: Tokens per second of ``cats.generate``, of each round.
        transformers_rounds: Tokens per second of ``model.generate``, of each round; empty for a
            sparse model.
        target_sparsity: Target of its calibration; None for another target or none.
        target_bytes: Its target as a share of bytes, or None.
        realized_sparsity: Name of each MLP to the share of neurons that it dropped.
    """

    perplexity: float
    mlp_share: float
    token_bytes: int
    answer: Answer
    rounds: list[float]
    transformers_rounds: list[float]
    target_sparsity: float | None = None
    target_bytes: float | None = None
    realized_sparsity: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Of ``cats.generate``: the median of the rounds."""
        return median(self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """All fields in one level, as ``cats demo --json`` prints them."""
        fields = asdict(self)
        answer: dict[str, Any] = fields.pop("answer")
        speeds = {"tokens_per_second": self.tokens_per_second}
        if self.transformers_rounds:
            speeds["transformers_tokens_per_second"] = median(self.transformers_rounds)
        return answer | fields | speeds


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """The result of :func:`demonstrate`.

    Attributes:
        model: Name of the model.
        text: Name of the text.
        dtype: Dtype of the weights.
        device: Device of the model.
        block: Tokens per block.
        seed: Seed of the draw of blocks.
        calibration_tokens: Number of calibration tokens.
        calibration_hash: Hash of the calibration tokens.
        held_out_tokens: Number of tokens for perplexity.
        prompt: Prompt of all models.
        sides: Label of each model, such as ``"dense"`` and ``"cats-50"``, to its measurements.
        profiles: Activations of ``"dense"`` and ``"cats"``, where they were profiled.
    """

    model: str
    text: str
    dtype: str
    device: str
    block: int
    seed: int
    calibration_tokens: int
    calibration_hash: str
    held_out_tokens: int
    prompt: str
    sides: dict[str, Side]
    profiles: dict[str, Profile] = field(default_factory=dict, repr=False)

    @property
    def dense(self) -> Side:
        return self.sides[DENSE]

    def to_dict(self) -> dict[str, Any]:
        """All but the profiles, as ``cats demo --json`` prints it."""
        names = [name for name in self.__dataclass_fields__ if name != "profiles"]
        values = {name: getattr(self, name) for name in names}
        return values | {"sides": {name: side.to_dict() for name, side in self.sides.items()}}

    def results(self) -> list[Result]:
        """Perplexity and the time of a token of each model."""
        return [r for name, side in self.sides.items() for r in self._results_of(side, name)]

    def save(self, folder: Path) -> Path:
        """Write results, profiles and a page of them; files of an earlier run are replaced.

        Returns:
            Path of the page.
        """
        from cats.report import Material, write_page

        files = [folder / "results.jsonl"]
        write_results(files[0], self.results())
        about = {"model": self.model, "text": self.text, "block": self.block}
        targets = [side.target_sparsity for side in self.sides.values() if side.target_sparsity]
        for name, profile in self.profiles.items():
            files.append(folder / f"profile-{name}.json")
            sparse = {"method": "cats", "target_sparsity": targets[0]} if name == "cats" else None
            profile.save(files[-1], **about, cats=sparse)
        page = folder / "report.html"
        write_page(Material.read(files), page, title=f"CATS on {self.model}: a demo")
        return page

    def _results_of(self, side: Side, name: str) -> list[Result]:
        shares = side.realized_sparsity
        dropped = sum(shares.values()) / len(shares) if shares else None
        measured_on = environment(self.device)
        common = {
            "model": self.model,
            "dtype": self.dtype,
            "seed": self.seed,
            "calibration_tokens": self.calibration_tokens,
        }

        def quartiles(values: list[float]) -> dict[str, Any]:
            low, _, high = quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
            return {
                "value": median(values),
                "low": low,
                "high": high,
                "samples": len(values),
                "environment": measured_on,
                **common,
            }

        # a label is a method and its target
        method = name if side.target_sparsity is side.target_bytes else name.rpartition("-")[0]
        quality = Perplexity(
            **quartiles([side.perplexity]),
            variant=name,
            method=method,
            target_sparsity=side.target_sparsity,
            target_bytes=side.target_bytes,
            realized_sparsity=dropped,
            text=f"{self.text}, held out",
            tokens=self.held_out_tokens,
            block=self.block,
            mlp_share=side.mlp_share,
            token_bytes=side.token_bytes,
            calibration_hash=self.calibration_hash,
        )
        speeds = {f"cats.generate, {side.answer.engine}": side.rounds}
        if side.transformers_rounds:
            speeds["model.generate"] = side.transformers_rounds
        # an answer of one token has no step to time
        times = [
            DemoTime(
                **quartiles([1e3 / speed for speed in rounds]),
                variant=loop,
                model_variant=name,
                sparsity=dropped or 0.0,
                realized_sparsity=dropped or 0.0,
                prompt=self.prompt,
            )
            for loop, rounds in speeds.items()
            if min(rounds) > 0
        ]
        return [quality, *times]
