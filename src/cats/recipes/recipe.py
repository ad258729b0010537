"""The steps of the paper's recipe on one model; each step writes its results into a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cats import fingerprint
from cats.benchmarks import decode as decode_benchmark
from cats.benchmarks import mlp as mlp_benchmark
from cats.calibration import Statistics, collect
from cats.config import check_target
from cats.data import text_start, token_blocks
from cats.errors import DataError
from cats.evaluation import run as evaluation_run
from cats.evaluation.answers import Value
from cats.evaluation.inputs import InputCounts
from cats.evaluation.profile import profile
from cats.evaluation.variants import Dense, Sparse, Variant
from cats.model import find_gated_mlps
from cats.protocols import CausalModel, Tokenizer
from cats.recipes.counting import check_text
from cats.recipes.evaluation import ask_tasks
from cats.recipes.progress import Progress
from cats.recipes.recipe_folder import Folder
from cats.recipes.splitting import split_masks
from cats.recipes.text import REFINED_WEB, refined_web, shuffled
from cats.results import Result
from cats.storage import load_json

_BATCH = 4
_HELD_OUT_BLOCKS = 20
_PROFILE_BLOCKS = 32
# Settings of answers that all variants of a table share.
_SHARED = ("limit", "seed", "data", "harness")


@dataclass(kw_only=True, slots=True)
class Recipe:
    """One run of the recipe; each step writes its results into ``folder``.

    Attributes:
        model: The dense model.
        tokenizer: Its tokenizer.
        folder: Folder of all results.
        name: Name of the model in results.
        targets: Target sparsities of CATS.
        samples: Number of calibration blocks.
        length: Tokens per block.
        seed: Seed of all random draws.
        bos: As for :func:`cats.data.token_blocks`.
        source: Name of the calibration text in results.
        revision: Revision of the model on the hub.
        progress: Shows each step.
    """

    model: nn.Module
    tokenizer: Tokenizer
    folder: Path
    name: str
    targets: Sequence[float] = (0.5, 0.7, 0.9)
    samples: int = 500
    length: int = 1024
    seed: int = 0
    bos: bool | None = None
    source: str = REFINED_WEB
    revision: str | None = None
    progress: Progress = field(default_factory=Progress)
    _identity: dict[str, Value] = field(init=False, repr=False)
    _results: Folder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for target in self.targets:
            check_target(target)
        # only once, since it reads all weights
        self._identity = evaluation_run.identity(self.model, self.tokenizer)
        self._results = Folder(self.folder, self.progress)

    @property
    def settings(self) -> dict[str, Value]:
        """Settings that every result depends on."""
        return {
            "model": self.name,
            **self._identity,
            "revision": self.revision,
            "calibration_text": self.source,
            "calibration_samples": self.samples,
            "calibration_length": self.length,
            "calibration_seed": self.seed,
            # None instead of False, as in folders of releases without this option
            "bos": bool(text_start(self.tokenizer, self.bos)) or None,
        }

    def split(self, text: str | None) -> tuple[Tensor, Tensor]:
        """Calibration blocks ``[N, T]`` and held-out ones, drawn by the seed.

        Args:
            text: Text to cut into blocks; None streams RefinedWeb from the hub.

        Raises:
            DataError: If the text fills fewer than two blocks.
        """
        count = self.samples + _HELD_OUT_BLOCKS
        # most documents are shorter than a block
        texts = [text] if text is not None else refined_web(20 * count, self.seed)
        limit = None if text is not None else count
        blocks = token_blocks(self.tokenizer, texts, length=self.length, limit=limit, bos=self.bos)
        if len(blocks) < 2:
            raise DataError(f"the text fills {len(blocks)} block of {self.length}, 2 are needed")
        blocks = shuffled(blocks, self.seed)
        held_out = min(_HELD_OUT_BLOCKS, max(1, len(blocks) // 5))
        calibration = blocks[held_out:][: self.samples]
        if len(calibration) < self.samples:
            self.progress.say(
                f"the text fills {len(calibration)} calibration blocks of {self.length} tokens, "
                f"not {self.samples}"
            )
            self.samples = len(calibration)
        return calibration, blocks[:held_out]

    def check_folder(self, blocks: Tensor, held_out: Tensor) -> None:
        """Refuse a folder with results of another recipe, model or text."""
        hashes: dict[str, Value] = {
            "calibration_hash": fingerprint.of_tokens(blocks),
            "held_out_hash": fingerprint.of_tokens(held_out),
        }
        self._results.check(self.settings | hashes)

    def eval_blocks(self, texts: Mapping[str, str], tokens: int | None) -> dict[str, Tensor]:
        """Name of each text to its blocks ``[N, T]``, of at most ``tokens`` tokens."""
        limit = None if tokens is None else tokens // self.length
        return {
            name: token_blocks(self.tokenizer, text, length=self.length, limit=limit, bos=self.bos)
            for name, text in texts.items()
        }

    def variants(self, blocks: Tensor, methods: Iterable[str]) -> Iterator[Variant]:
        """Dense, CATS at every target, ReLU, and the other methods at the bytes of each target."""
        methods = {*methods}
        yield Dense()
        if "cats" in methods:
            statistics = self._statistics("cats", blocks)
            for target in self.targets:
                yield Sparse(statistics.config(target))
        if "relu" in methods:
            yield Sparse(self._statistics("relu", blocks).config())
        for name in sorted(methods - {"cats", "relu", "input", "teal"}):
            masks = split_masks(
                self.model,
                blocks,
                method=name,
                batch_size=_BATCH,
                statistics=self.folder / "samples.safetensors",
                progress=self.progress,
            )
            for target in self.targets:
                share = 1 - 2 / 3 * target
                if share < masks.paths.lowest:
                    self.progress.say(f"{name} cannot read as little as {share:.1%}: left out")
                else:
                    yield Sparse(masks.config(share))
        if not {"input", "teal"} & methods:
            return
        batches = self.progress.track(blocks.split(_BATCH), "counting inputs")
        inputs = InputCounts.collect(self.model, batches)
        for target in self.targets:
            # CATS reads all of gate, and leaves the share unread in two of three matrices
            equal_bytes = 2 / 3 * target
            if "input" in methods:
                yield inputs.uniform(equal_bytes)
            if "teal" in methods:
                yield inputs.teal(equal_bytes)

    def perplexity(self, variant: Variant, text: str, blocks: Tensor) -> None:
        """Measure the perplexity of one variant on one text."""
        file = f"perplexity/{variant.label}-{text.replace('/', '-').replace(', ', '-')}.jsonl"
        batches = blocks.split(_BATCH)
        settings = self.settings | variant.settings | evaluation_run.text_settings(batches)

        def measure() -> Iterator[Result]:
            yield evaluation_run.measure_perplexity(
                self.model,
                variant,
                batches,
                text=text,
                settings=self.settings,
                track=lambda batches: self.progress.track(batches, variant.label),
            )

        self._results.keep(file.replace(" ", "-"), measure, settings)

    def profiles(self, variants: Sequence[Variant], blocks: Tensor) -> None:
        """Profile the activations of each variant."""
        batches = blocks[:_PROFILE_BLOCKS].split(8)
        for variant in variants:
            path = self.folder / f"profile-{variant.label}.json"
            settings = self.settings | variant.settings | evaluation_run.text_settings(batches)
            if path.exists():
                before = load_json(path, "profile").get("settings", {})
                evaluation_run.check_same(path, "activations", before, settings)
                continue
            with variant.on(self.model) as model:
                about = {"cats": getattr(model.config, "cats", None), "text": self.source}
                measured = profile(model, self.progress.track(batches, "profiling"))
            measured.save(path, model=self.name, block=self.length, settings=settings, **about)

    def tasks(
        self,
        variants: Sequence[Variant],
        names: Sequence[str],
        *,
        limit: int | None = None,
        batch_size: int | str = "auto",
        data_dir: Path | None = None,
    ) -> None:
        """Zero-shot tasks of every variant, resumed task by task."""
        scores = ask_tasks(
            self.model,
            self.tokenizer,
            variants,
            names,
            folder=self.folder / "answers",
            settings=self.settings,
            limit=limit,
            seed=self.seed,
            batch_size=batch_size,
            data_dir=data_dir,
            progress=self.progress,
        )
        self._results.add_variants("tasks.jsonl", scores, {*self.settings, *_SHARED})

    def mlp_times(self) -> None:
        """Time one MLP of the model, in float32 as in the paper and in the model's dtype."""
        mlp = find_gated_mlps(self.model)[0]
        device = next(self.model.parameters()).device
        on_cpu = device.type == "cpu"
        for dtype in dict.fromkeys((torch.float32, cast(CausalModel, self.model).dtype)):
            name = str(dtype).removeprefix("torch.")
            file = f"mlp-{name}.jsonl"
            targets = self._results.targets_in(file, self.targets)
            case = mlp_benchmark.Case(
                hidden_size=mlp.hidden_size,
                intermediate_size=mlp.intermediate_size,
                dtype=dtype,
                device=str(device),
                sparsities=tuple(targets),
                # a CPU reads more slowly, and its compiler takes minutes
                rounds=5 if on_cpu else 50,
                size=2**28 if on_cpu else 2**32,
                compiled=not on_cpu,
            )
            with self.progress.stage() as show:
                show(f"timing one MLP in {name}")
                self._results.keep(file, partial(mlp_benchmark.measure, case), sparsities=targets)

    def token_times(self, blocks: Tensor) -> None:
        """Time a decoded token at batch 1: dense, and sparse at every target with fused MLPs."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        targets = self._results.targets_in("tokens.jsonl", self.targets)
        case = decode_benchmark.Case(
            model=self.name,
            sparsities=(0.0, *targets),
            prompt_length=self.length // 2,
            new_tokens=min(64, self.length // 2),
            rounds=2 if on_cpu else 5,
            read_bytes=2**28 if on_cpu else 2**32,
        )
        with self.progress.stage() as show:
            measure = partial(
                decode_benchmark.measure,
                self.model,
                blocks,
                case,
                on_stage=lambda text: show(f"timing tokens: {text}"),
            )
            self._results.keep("tokens.jsonl", measure, sparsities=targets)

    def report(self) -> Path:
        """Write a page of all results in the folder; returns its path."""
        from cats.report import Material, write_page

        page = self.folder / "report.html"
        write_page(Material.read([self.folder]), page, title=f"CATS on {self.name}")
        return page

    def _statistics(self, method: str, blocks: Tensor) -> Statistics:
        path = self.folder / f"statistics-{method}.safetensors"
        if path.exists():
            # adding to empty statistics of this model refuses counts of another model
            statistics = collect(self.model, [], method=method) + Statistics.load(path)
            message = f"{path}: counts of another text or seed; name another folder"
            check_text(statistics, blocks, message)
            return statistics
        batches = self.progress.track(blocks.split(_BATCH), f"calibrating {method}")
        statistics = collect(self.model, batches, method=method)
        statistics.save(path)
        return statistics
