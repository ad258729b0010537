"""``cats reproduce``: the paper's whole recipe on one model, ending in a report."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats.cli import options
from cats.cli.running import resumable, stage

if TYPE_CHECKING:
    from torch import Tensor

    from cats.calibration import Statistics
    from cats.evaluation.answers import Value
    from cats.evaluation.variants import Variant
    from cats.results import Result

_METHODS = ("cats", "relu", "input", "teal")
_REFINED_WEB = "tiiuae/falcon-refinedweb"
_RECIPE = "recipe.json"
_BATCH = 4
_HELD_OUT_BLOCKS = 20
_PROFILE_BLOCKS = 32
# Settings of answers that all variants of a table have in common.
_ASKED = ("limit", "seed", "data", "harness")


def reproduce(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder; a run that stopped continues from it.")
    ],
    model: Annotated[
        str, typer.Option(help="A folder, a Hugging Face id, or [b]smollm2[/b].")
    ] = "mistralai/Mistral-7B-v0.1",
    sparsity: Annotated[str, typer.Option(help="Targets of CATS, by commas.")] = "0.5,0.7,0.9",
    methods: Annotated[
        str,
        typer.Option(help="What is compared with the dense model, by commas.", show_default="all"),
    ] = ",".join(_METHODS),
    text: Annotated[
        Path | None,
        typer.Option(help="Calibration text.", show_default="RefinedWeb, from the hub"),
    ] = None,
    eval_text: Annotated[
        list[Path] | None,
        typer.Option(help="Text for perplexity beside held-out calibration text; repeatable."),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Of each such text, at most, in whole blocks.", show_default="all"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Blocks of calibration text.")] = 500,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 1024,
    seed: options.Seed = 0,
    bos: options.Bos = None,
    tasks: Annotated[str, typer.Option(help="Zero-shot tasks, by commas.")] = "paper8",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions a task.", show_default="all")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Parquet files of the tasks, as for cats evaluate.")
    ] = None,
    speed: Annotated[bool, typer.Option(help="Time the MLP and tokens as well.")] = True,
    batch_size: Annotated[str, typer.Option(help="Questions a forward pass, or auto.")] = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """The paper's recipe on one model: quality, activations and speed of every method, a report.

    Example: [b]cats reproduce --model mistralai/Mistral-7B-v0.1 -o mistral[/b]

    Compared are dense, CATS, ReLU, and input thresholding, uniform and as TEAL allocates it, at
    the bytes a token of each CATS target. What is in the folder already is not measured again.
    """
    from cats.cli.evaluate import check_tasks, parse_batch_size
    from cats.data import read_text
    from cats.evaluation.run import identity

    targets, chosen = _targets(sparsity), _chosen(methods)
    batch = parse_batch_size(batch_size)
    options.check_output(output / "report.html")
    options.check_tokens(eval_tokens, length, "--eval-tokens")
    # a wrong name is told before the model is loaded
    calibration = None if text is None else read_text(text)
    evaluation = {path.name: read_text(path) for path in eval_text or []}
    names = check_tasks(tasks, data_dir)
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, tokenizer = options.load(model, dtype=dtype, device=device, dense=True, hub=hub)
    recipe = Recipe(
        model=loaded, tokenizer=tokenizer, folder=output, name=model, targets=targets,
        samples=samples, length=length, seed=seed, bos=bos,
        source=_REFINED_WEB if text is None else text.name,
        identity=identity(loaded, tokenizer) | {"revision": revision},
    )  # fmt: skip
    with resumable(output, _has_results):
        with options.err.status("reading the text ..."):
            blocks, held_out = recipe.split(calibration)
            recipe.check_folder(blocks, held_out)
            texts = {f"{recipe.source}, held out": held_out} | recipe.eval_blocks(
                evaluation, eval_tokens
            )
        variants = list(recipe.variants(blocks, chosen))
        for variant in variants:
            for title, evaluated in texts.items():
                recipe.perplexity(variant, title, evaluated)
        recipe.profiles(variants[:2], held_out)
        recipe.tasks(variants, names, limit=limit, batch_size=batch, data_dir=data_dir)
        if speed:
            recipe.mlp_times()
            recipe.token_times(held_out)
        recipe.report()


def _has_results(folder: Path) -> bool:
    return any(folder.rglob("*.jsonl")) or any(folder.glob("statistics-*.safetensors"))


def _chosen(text: str) -> list[str]:
    from cats.errors import ConfigError

    chosen = [part.strip() for part in text.split(",")]
    if unknown := [name for name in chosen if name not in _METHODS]:
        raise ConfigError(f"--methods: expected some of {', '.join(_METHODS)}, got {unknown[0]!r}")
    return chosen


def _targets(text: str) -> list[float]:
    from cats.config import check_target
    from cats.errors import ConfigError

    try:
        targets = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sparsity: expected numbers by commas, got {text!r}") from error
    for target in targets:
        check_target(target)
    return targets


@dataclass(kw_only=True, slots=True)
class Recipe:
    """One run of the recipe; each step keeps what it finds in ``folder``."""

    model: Any
    tokenizer: Any
    folder: Path
    name: str
    targets: list[float]
    samples: int
    length: int
    seed: int
    bos: bool | None
    source: str
    identity: dict[str, Value]

    @property
    def settings(self) -> dict[str, Value]:
        """What every number depends on."""
        from cats.data import text_start

        return {
            "model": self.name,
            **self.identity,
            "calibration_text": self.source,
            "calibration_samples": self.samples,
            "calibration_length": self.length,
            "calibration_seed": self.seed,
            # None, as in folders from before there was the choice
            "bos": bool(text_start(self.tokenizer, self.bos)) or None,
        }

    def split(self, text: str | None) -> tuple[Tensor, Tensor]:
        """Calibration blocks ``[N, T]`` and held-out ones, drawn by the seed."""
        import torch

        from cats.data import token_blocks
        from cats.errors import DataError

        wanted = self.samples + _HELD_OUT_BLOCKS
        texts = [text] if text is not None else self._refined_web(wanted)
        limit = None if text is not None else wanted
        blocks = token_blocks(self.tokenizer, texts, length=self.length, limit=limit, bos=self.bos)
        if len(blocks) < 2:
            raise DataError(f"the text fills {len(blocks)} block of {self.length}, 2 are needed")
        generator = torch.Generator().manual_seed(self.seed)
        blocks = blocks[torch.randperm(len(blocks), generator=generator)]
        held_out = min(_HELD_OUT_BLOCKS, max(1, len(blocks) // 5))
        calibration = blocks[held_out:][: self.samples]
        if len(calibration) < self.samples:
            options.err.print(
                f"the text fills {len(calibration)} calibration blocks of {self.length} tokens, "
                f"not {self.samples}"
            )
            self.samples = len(calibration)
        return calibration, blocks[:held_out]

    def check_folder(self, blocks: Tensor, held_out: Tensor) -> None:
        """Write what the folder's results depend on, or compare it with what stands there.

        Raises:
            DataError: If the folder holds results of another recipe, model or text, or of a release
                that did not write down what they are of.
        """
        from cats import fingerprint
        from cats.errors import DataError
        from cats.evaluation.run import check_same
        from cats.storage import load_json, save_json

        hashes: dict[str, Value] = {
            "calibration_hash": fingerprint.of_tokens(blocks),
            "held_out_hash": fingerprint.of_tokens(held_out),
        }
        wanted = self.settings | hashes
        path = self.folder / _RECIPE
        if not path.exists():
            if _has_results(self.folder):
                raise DataError(
                    f"{self.folder}: holds results, but no {_RECIPE} that says what they are of, "
                    "as an older release wrote them; name another folder or delete it"
                )
            save_json(path, "recipe", {"settings": wanted})
        # read again: another process may fill the same folder
        check_same(path, "results", load_json(path, "recipe").get("settings", {}), wanted)

    def _refined_web(self, blocks: int) -> Iterator[str]:
        from cats.errors import ConfigError

        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ConfigError(
                "RefinedWeb needs the data library: pip install 'cats-llm[eval]', or give --text"
            ) from error
        stream = load_dataset(_REFINED_WEB, split="train", streaming=True)
        # a document is shorter than a block more often than not
        for row in itertools.islice(stream.shuffle(seed=self.seed), 20 * blocks):
            yield row["content"]

    def eval_blocks(self, texts: Mapping[str, str], tokens: int | None) -> dict[str, Tensor]:
        """Name of each text to its blocks, of at most so many tokens."""
        from cats.data import token_blocks

        limit = None if tokens is None else tokens // self.length
        return {
            name: token_blocks(self.tokenizer, text, length=self.length, limit=limit, bos=self.bos)
            for name, text in texts.items()
        }

    def variants(self, blocks: Tensor, methods: Sequence[str]) -> Iterator[Variant]:
        """Dense, CATS at every target, ReLU, and input thresholding at the bytes of each target."""
        from cats.evaluation.inputs import InputCounts
        from cats.evaluation.variants import Dense, Sparse

        yield Dense()
        if "cats" in methods:
            counted = self._statistics("cats", blocks)
            for target in self.targets:
                yield Sparse(counted.config(target))
        if "relu" in methods:
            yield Sparse(self._statistics("relu", blocks).config())
        if not {"input", "teal"} & set(methods):
            return
        batches = options.progress(blocks.split(_BATCH), "counting inputs")
        inputs = InputCounts.collect(self.model, batches)
        for target in self.targets:
            # gate is read whole: of three matrices, two leave the share unread
            equal_bytes = 2 / 3 * target
            if "input" in methods:
                yield inputs.uniform(equal_bytes)
            if "teal" in methods:
                yield inputs.teal(equal_bytes)

    def _statistics(self, method: str, blocks: Tensor) -> Statistics:
        from cats.calibration import Statistics, collect
        from cats.calibration.collect import block_hash
        from cats.errors import DataError

        path = self.folder / f"statistics-{method}.safetensors"
        if path.exists():
            # added to nothing of this model: counts of another one are refused
            found = collect(self.model, [], method=method) + Statistics.load(path)
            if found.text_hash != sum(map(block_hash, blocks)) % (1 << 64):
                raise DataError(f"{path}: counts of another text or seed; name another folder")
            return found
        batches = options.progress(blocks.split(_BATCH), f"calibrating {method}")
        found = collect(self.model, batches, method=method)
        found.save(path)
        return found

    def perplexity(self, variant: Variant, text: str, blocks: Tensor) -> None:
        """Of one variant on one text."""
        from cats.evaluation.run import measure_perplexity, text_settings

        file = f"perplexity/{variant.label}-{text.replace('/', '-').replace(', ', '-')}.jsonl"
        batches = blocks.split(_BATCH)
        wanted = self.settings | variant.settings | text_settings(batches)
        self._once(file.replace(" ", "-"), lambda: [
            measure_perplexity(
                self.model, variant, list(options.progress(batches, variant.label)),
                text=text, settings=self.settings,
            )
        ], wanted)  # fmt: skip

    def profiles(self, variants: list[Variant], blocks: Tensor) -> None:
        """Activations of the dense model and of the sparse one of the first target."""
        from cats.evaluation.profile import profile
        from cats.evaluation.run import check_same, text_settings
        from cats.storage import load_json

        batches = blocks[:_PROFILE_BLOCKS].split(8)
        for variant in variants:
            path = self.folder / f"profile-{variant.label}.json"
            wanted = self.settings | variant.settings | text_settings(batches)
            if path.exists():
                check_same(
                    path, "activations", load_json(path, "profile").get("settings", {}), wanted
                )
                continue
            with variant.on(self.model) as model:
                about = {"cats": getattr(model.config, "cats", None), "text": self.source}
                seen = profile(model, options.progress(batches, "profiling"))
            seen.save(path, model=self.name, block=self.length, settings=wanted, **about)

    def tasks(
        self,
        variants: list[Variant],
        names: list[str],
        *,
        limit: int | None,
        batch_size: int | str,
        data_dir: Path | None,
    ) -> None:
        """Zero-shot tasks of every variant, resumed task by task."""
        from cats.cli.evaluate import asked
        from cats.evaluation.run import answer_tasks, results
        from cats.results import read_results

        found: list[Result] = []
        dense = None
        for variant in variants:
            answers = []
            for answer in answer_tasks(
                self.model, self.tokenizer, variant, names, folder=self.folder / "answers",
                settings=self.settings, limit=limit, seed=self.seed, batch_size=batch_size,
                data_dir=data_dir, on_task=asked(variant.label),
            ):  # fmt: skip
                answers.append(answer)
                options.err.print(f"{variant.label}: {answer.task} done")
            dense = dense or answers
            found += results(variant.label, answers, dense)
        path = self.folder / "tasks.jsonl"
        before = read_results(path) if path.exists() else []
        _write(path, found + _of_other_variants(before, found, {*self.settings, *_ASKED}))

    def mlp_times(self) -> None:
        """One MLP of the model's shape, in float32 as in the paper and in the model's dtype."""
        import torch

        from cats.benchmarks.mlp import Case, measure
        from cats.mlp import find_gated_mlps

        mlp = find_gated_mlps(self.model)[0]
        device = next(self.model.parameters()).device
        on_cpu = device.type == "cpu"
        for dtype in dict.fromkeys((torch.float32, self.model.dtype)):
            name = str(dtype).removeprefix("torch.")
            file = f"mlp-{name}.jsonl"
            targets = self._targets_in(file)
            case = Case(
                hidden_size=mlp.hidden_size, intermediate_size=mlp.intermediate_size, dtype=dtype,
                device=str(device), sparsities=tuple(targets),
                # a CPU reads slower, and its compiler takes minutes
                rounds=5 if on_cpu else 50, size=2**28 if on_cpu else 2**32, compiled=not on_cpu,
            )  # fmt: skip
            with stage() as show:
                show(f"timing one MLP in {name}")
                self._once(file, partial(measure, case), sparsities=targets)

    def token_times(self, blocks: Tensor) -> None:
        """A decoded token at batch 1: dense, and sparse at every target with fused MLPs."""
        from cats.benchmarks.decode import Case, measure

        on_cpu = next(self.model.parameters()).device.type == "cpu"
        targets = self._targets_in("tokens.jsonl")
        case = Case(
            model=self.name, sparsities=(0.0, *targets), prompt_length=self.length // 2,
            new_tokens=min(64, self.length // 2), rounds=2 if on_cpu else 5,
            read_bytes=2**28 if on_cpu else 2**32,
        )  # fmt: skip
        with stage() as show:
            self._once(
                "tokens.jsonl",
                partial(
                    measure, self.model, blocks, case,
                    on_stage=lambda text: show(f"timing tokens: {text}"),
                ),
                sparsities=targets,
            )  # fmt: skip

    def _targets_in(self, file: str) -> list[float]:
        """Targets of this run and of what a file holds already: they are timed in turns."""
        from cats.results import read_results

        path = self.folder / file
        stored = read_results(path) if path.exists() else []
        before = {float(r.settings.get("sparsity") or 0) for r in stored} - {0.0}
        return sorted({*self.targets, *before})

    def report(self) -> None:
        """The page of all that lies in the folder."""
        from cats.report import Material, write_page

        page = self.folder / "report.html"
        write_page(Material.read([self.folder]), page, title=f"CATS on {self.name}")
        options.out.print(f"wrote {page}", markup=False)

    def _once(
        self,
        file: str,
        measure: Callable[[], Iterable[Result]],
        wanted: Mapping[str, Value] | None = None,
        sparsities: Sequence[float] = (),
    ) -> None:
        """Keep the results of ``measure`` in a file, unless they are there, at all sparsities.

        Those that are there must be of the settings ``wanted``.
        """
        from cats.errors import BackendError
        from cats.evaluation.run import check_same
        from cats.results import read_results

        path = self.folder / file
        found = read_results(path) if path.exists() else []
        for result in found:
            check_same(path, "results", result.settings, wanted or {})
        if not found or set(sparsities) - {r.settings.get("sparsity") for r in found}:
            try:
                _write(path, list(measure()))
            except BackendError as error:
                options.err.print(f"[b]left out:[/b] {file}: {error}")


def _of_other_variants(before: list[Result], found: list[Result], shared: set[str]) -> list[Result]:
    """Of an earlier run with other targets or methods, what was asked the same tasks.

    The settings ``shared`` must be the same in both.
    """

    def asked_of(result: Result) -> tuple[object, ...]:
        names = sorted(shared)
        return (result.settings["task"], *(result.settings.get(name) for name in names))

    same = {asked_of(result) for result in found}
    before = [result for result in before if asked_of(result) in same]
    labels, tasks = ({r.settings[key] for r in found} for key in ("variant", "task"))
    asked: defaultdict[object, set[object]] = defaultdict(set)
    for result in before:
        asked[result.settings["variant"]].add(result.settings["task"])
    others = {label for label in asked.keys() - labels if asked[label] == tasks}
    return [result for result in before if result.settings["variant"] in others]


def _write(path: Path, results: list[Result]) -> None:
    from cats.storage import replacing

    with replacing(path) as temporary:
        temporary.write_text("".join(result.to_json() + "\n" for result in results))
