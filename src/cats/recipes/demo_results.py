"""The results of a demo: numbers of the dense and of the sparse model, records, and a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from cats.config import label_of
from cats.evaluation.profile import Profile
from cats.recipes.evaluation import write_results
from cats.recipes.generation import Answer
from cats.results import DemoTime, Perplexity, Result, environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Measurements of the dense model, or of the sparse model.

    Attributes:
        perplexity: Perplexity on the held-out text.
        mlp_share: Share of the MLPs' weights that a token reads.
        token_bytes: Bytes that a token reads.
        answer: The first answer of ``cats.generate`` to the prompt.
        rounds: Tokens per second of ``cats.generate``, of each round.
        transformers_rounds: Tokens per second of ``model.generate``, of each round.
    """

    perplexity: float
    mlp_share: float
    token_bytes: int
    answer: Answer
    rounds: list[float]
    transformers_rounds: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Of ``cats.generate``: the median of the rounds."""
        return median(self.rounds)

    @property
    def transformers_tokens_per_second(self) -> float:
        """Of ``model.generate``: the median of the rounds."""
        return median(self.transformers_rounds)

    def to_dict(self) -> dict[str, Any]:
        """All fields in one level, as ``cats demo --json`` prints them."""
        return {
            "perplexity": self.perplexity,
            "mlp_share": self.mlp_share,
            "token_bytes": self.token_bytes,
            **asdict(self.answer),
            "tokens_per_second": self.tokens_per_second,
            "rounds": self.rounds,
            "transformers_tokens_per_second": self.transformers_tokens_per_second,
            "transformers_rounds": self.transformers_rounds,
        }


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
        target_sparsity: Target of the calibration.
        calibration_tokens: Number of calibration tokens.
        calibration_hash: Hash of the calibration tokens.
        held_out_tokens: Number of tokens for perplexity.
        thresholds: Name of each MLP to its threshold.
        realized_sparsity: Name of each MLP to the share of neurons that it dropped.
        prompt: Prompt of both models.
        dense: The dense model.
        cats: The sparse model.
        profiles: Activations of ``"dense"`` and ``"cats"``, where they were profiled.
    """

    model: str
    text: str
    dtype: str
    device: str
    block: int
    seed: int
    target_sparsity: float
    calibration_tokens: int
    calibration_hash: str
    held_out_tokens: int
    thresholds: dict[str, float]
    realized_sparsity: dict[str, float]
    prompt: str
    dense: Side
    cats: Side
    profiles: dict[str, Profile] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the profiles, as ``cats demo --json`` prints it."""
        names = [name for name in self.__dataclass_fields__ if name != "profiles"]
        values = {name: getattr(self, name) for name in names}
        return values | {"dense": self.dense.to_dict(), "cats": self.cats.to_dict()}

    def results(self) -> list[Result]:
        """Perplexity, and the time of a token through both loops, dense and sparse."""
        dense = self._results_of(self.dense, "dense", None)
        return dense + self._results_of(self.cats, "cats", self.target_sparsity)

    def save(self, folder: Path) -> Path:
        """Write results, profiles and a page of them; files of an earlier run are replaced.

        Returns:
            Path of the page.
        """
        from cats.report import Material, write_page

        files = [folder / "results.jsonl"]
        write_results(files[0], self.results())
        about = {"model": self.model, "text": self.text, "block": self.block}
        sparse = {"method": "cats", "target_sparsity": self.target_sparsity}
        for name, profile in self.profiles.items():
            files.append(folder / f"profile-{name}.json")
            profile.save(files[-1], **about, cats=sparse if name == "cats" else None)
        page = folder / "report.html"
        write_page(Material.read(files), page, title=f"CATS on {self.model}: a demo")
        return page

    def _results_of(self, side: Side, name: str, target: float | None) -> list[Result]:
        dropped = sum(self.realized_sparsity.values()) / len(self.realized_sparsity)
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

        quality = Perplexity(
            **quartiles([side.perplexity]),
            variant=label_of(name, target),
            method=name,
            target_sparsity=target,
            realized_sparsity=None if target is None else dropped,
            text=f"{self.text}, held out",
            tokens=self.held_out_tokens,
            block=self.block,
            mlp_share=side.mlp_share,
            token_bytes=side.token_bytes,
            calibration_hash=self.calibration_hash,
        )
        speeds = {
            f"cats.generate, {side.answer.engine}": side.rounds,
            "model.generate": side.transformers_rounds,
        }
        # an answer of one token has no step to time
        times = [
            DemoTime(
                **quartiles([1e3 / speed for speed in rounds]),
                variant=loop,
                sparsity=target or 0.0,
                realized_sparsity=0.0 if target is None else dropped,
                prompt=self.prompt,
            )
            for loop, rounds in speeds.items()
            if min(rounds) > 0
        ]
        return [quality, *times]
