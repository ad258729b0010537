"""``cats info``: the installation, or the content of a model or of a file that cats wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias, TypeVar

import typer

from cats.cli import options

if TYPE_CHECKING:
    from cats.config import CatsConfig
    from cats.protocols import ModelConfig

V = TypeVar("V")
# Title of each table to its names and values.
Sections: TypeAlias = dict[str, dict[str, object]]


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a Hugging Face id, [b]smollm2[/b], a file of thresholds or statistics, "
            "or the folder of a fine-tuning.",
            show_default="this installation",
        ),
    ] = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Show this installation, or what a model or file holds.

    Example: [b]cats info cats50.safetensors[/b]

    For a model, also the engine with which [b]cats generate[/b] would run it here.
    """
    options.quiet()
    hub = options.hub(revision, subfolder, trust_remote_code)
    report = _installation() if model is None else _describe(model, hub)
    if as_json:
        options.print_json(report)
        return
    from cats.cli.tables import field_table

    for title, values in report.items():
        options.out.print(field_table(title, values).rich())


def _installation() -> Sections:
    import platform

    import torch
    import transformers

    from cats.version import __version__

    threads = torch.get_num_threads()
    noun = "thread" if threads == 1 else "threads"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "cats": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "devices": {
            "cpu": f"{threads} {noun}, {torch.backends.cpu.get_cpu_capability()}",
            "gpu": ", ".join(gpus) or "none",
        },
        "backends of cats::gated_mlp": _backends(),
    }


def _backends() -> dict[str, object]:
    import cats

    states: dict[str, object] = dict(cats.ops.backends())
    clone = Path(cats.__file__).parents[2]
    if states["cpu"] != "live" and (clone / "setup.py").is_file():
        states["cpu"] = f"{states['cpu']}; to build them in this clone: pip install -e {clone}"
    return states


def _describe(model: str, hub: options.Hub) -> Sections:
    from cats.checkpoint import is_sparse_checkpoint, load_config, read_config
    from cats.config import CatsConfig
    from cats.errors import ConfigError
    from cats.formats import split
    from cats.storage import load_tensors

    name = Path(model).name
    if hub and Path(model).is_file():
        raise ConfigError(f"{model} is a file: options of the hub are for a model")
    # statistics may have any name; of models, only GGUF is a file
    other = model.endswith(".jsonl") or split(model) is not None
    if model.endswith(".safetensors") or (Path(model).is_file() and not other):
        _, block = load_tensors(model)
        if block.get("kind") == "statistics":
            return _describe_statistics(model)
        if block.get("kind") == "samples":
            return _describe_samples(model)
        return _describe_config(name, CatsConfig.load(model))
    if (Path(model) / "adapter_config.json").is_file():
        return _describe_adapter(Path(model))
    history = Path(model) / "history.jsonl" if Path(model).is_dir() else Path(model)
    if history.suffix == ".jsonl" and history.is_file():
        return _describe_history(name, history)
    path = options.resolve(model, **hub)
    sparse, config = is_sparse_checkpoint(path, **hub), load_config(path, **hub)
    dense: Sections = {name: {"thresholds": "none: a dense model"}}
    return {
        **(_describe_config(name, read_config(path, **hub)) if sparse else dense),
        **_quantised_weights(path, config, hub),
        "architecture": _architecture(config, hub.get("trust_remote_code", False)),
        "engines of cats.generate": _engines(path, config, hub, sparse=sparse),
    }


def _quantised_weights(path: str, config: ModelConfig, hub: options.Hub) -> Sections:
    """What of a checkpoint is quantised, and how; nothing for one in ordinary numbers."""
    from cats import formats

    title = "quantised weights"
    if formats.split(path) is not None:
        kinds = formats.gguf_kinds(path)
        matrices = {kind: f"{count} matrices" for kind, count in kinds.items()}
        return {title: {"format": "GGUF", **matrices}}
    if (kind := formats.stored_kind(config)) is None:
        return {}
    about: dict[str, object] = {"format": kind}
    folder = Path(path) / hub.get("subfolder", "")
    if folder.is_dir() and formats.stored_format(getattr(config, "quantization_config", None)):
        layers: dict[str, list[str]] = {}
        for name, weight in formats.stored_layers(folder, config).items():
            layers.setdefault(f"{weight.kind}, {weight.scaling}", []).append(name)
        for how, names in layers.items():
            last = dict.fromkeys(name.rpartition(".")[2] for name in names)
            noun = "layer" if len(names) == 1 else "layers"
            about[how] = f"{len(names)} {noun}: {', '.join(last)}"
    return {title: about}


def _architecture(config: ModelConfig, trust_remote_code: bool) -> dict[str, object]:
    from cats.errors import UnsupportedModelError
    from cats.recipes.description import architecture

    try:
        sizes = architecture(config, trust_remote_code=trust_remote_code)
    except UnsupportedModelError as error:
        return {"none": str(error)}
    about = {
        name: getattr(sizes, name)
        for name in ("model", "layers", "hidden_size", "parameters", "dtype")
    }
    if sizes.refusal:
        return about | {"gated_mlps": f"none: {sizes.refusal}"}
    return about | {
        "gated_mlps": sizes.gated_mlps,
        "intermediate_size": _one_or_all(sizes.intermediate_sizes),
        "activation": _one_or_all(sizes.activations),
    }


def _one_or_all(values: Sequence[object]) -> object:
    """The value if there is only one; else all of them, separated by commas."""
    return values[0] if len(values) == 1 else ", ".join(map(str, values))


def _describe_config(title: str, config: CatsConfig) -> Sections:
    block: dict[str, object] = config.to_dict()
    del block["realized_sparsity"]
    shares = {name: f"{share:.1%}" for name, share in config.realized_sparsity.items()}
    same = len({*shares.values()}) == 1 and shares.keys() == config.thresholds.keys()
    if same:
        block["dropped in calibration"] = f"{next(iter(shares.values()))} in each MLP"
    thresholds: dict[str, object] = {
        name: f"threshold {float(t.mean()):.4f}"
        + (f", {shares[name]} dropped in calibration" if name in shares and not same else "")
        for name, t in _by_layer(config.thresholds).items()
    }
    sections: Sections = {title: block, "MLPs": thresholds}
    if config.inputs:
        sections["Inputs"] = {
            name: f"threshold {float(t.mean()):.4f}" for name, t in _by_layer(config.inputs).items()
        }
    return sections


def _describe_adapter(folder: Path) -> Sections:
    from cats.config import CatsConfig
    from cats.errors import FormatError

    try:
        block = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        about: dict[str, object] = {
            "kind": "adapter",
            "base": block["base_model_name_or_path"],
            "rank": block["r"],
            "alpha": block["lora_alpha"],
            "layers": ", ".join(sorted(block["target_modules"])),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder}: not a LoRA adapter ({error!r})") from error
    thresholds = folder / "thresholds.safetensors"
    if not thresholds.is_file():
        return {folder.name: about | {"thresholds": "none: of a dense model"}}
    return {folder.name: about} | _describe_config(thresholds.name, CatsConfig.load(thresholds))


def _describe_history(title: str, path: Path) -> Sections:
    from cats.history import History

    history = History.load(path)
    settings, last = history.settings, history.points[-1] if history.points else None
    about = {
        "kind": "fine-tuning",
        "model": settings.get("model"),
        "method": settings["method"],
        "target_sparsity": settings["target_sparsity"],
        "steps": f"{last.step if last else 0:,} of {settings['options']['steps']:,}",
        "complete": "yes" if history.complete else "no: the same command continues it",
    }
    losses: dict[str, object] = {
        name: f"log-perplexity {history.points[0].losses[name]:.4f} > {loss:.4f}"
        for name, loss in (last.losses if last else {}).items()
        if name in history.points[0].losses
    }
    return {title: about} | ({"evaluations": losses} if losses else {})


def _describe_statistics(path: str) -> Sections:
    from cats.calibration import Statistics

    statistics = Statistics.load(path)
    about: dict[str, object] = {
        "kind": "statistics: counts for every target sparsity",
        "method": statistics.method,
        "calibration_tokens": statistics.tokens,
        "blocks": statistics.blocks,
        "calibration_hash": f"{statistics.text_hash:016x}",
    }
    mlps: dict[str, object] = {}
    for name, size in _by_layer(statistics.sizes).items():
        counts = statistics.counts[name]
        mlps[name] = (
            f"{size:,} neurons, {statistics.activations[name]}, {int(counts.sum()):,} activations "
            f"in {int(counts.count_nonzero()):,} bins"
        )
    return {Path(path).name: about, "MLPs": mlps}


def _describe_samples(path: str) -> Sections:
    from cats.calibration import Paths, Samples

    samples, block = Samples.load(path)
    about: dict[str, object] = {
        "kind": "samples: inputs and gradients for methods with several masks",
        "calibration_tokens": samples.tokens,
        "blocks": samples.blocks,
        "layers": len(samples.inputs),
    }
    for method, paths in block.get("paths", {}).items():
        known = Paths.from_dict(paths, path)
        about[method] = f"paths of {len(known.points)} layers, least bytes {known.lowest:.1%}"
    return {Path(path).name: about}


def _by_layer(values: Mapping[str, V]) -> dict[str, V]:
    """The values sorted by number, so that layer 2 precedes layer 10."""

    def padded(name: str) -> str:
        return re.sub(r"\d+", lambda number: number[0].zfill(6), name)

    return {name: values[name] for name in sorted(values, key=padded)}


def _engines(
    path: str, config: ModelConfig, hub: options.Hub, *, sparse: bool
) -> dict[str, object]:
    """Name of each engine to whether it would decode the model on this machine, or why not."""
    import torch

    from cats.checkpoint import from_pretrained, load_dense
    from cats.decode import ENGINES
    from cats.decode.cache import SlotCache
    from cats.decode.engines import make_engine
    from cats.errors import CatsError, UnsupportedModelError
    from cats.fusion import fuse_
    from cats.weights import is_quantised

    try:
        SlotCache(config, 1)
    except UnsupportedModelError as error:
        return {"none": str(error)}
    device, place = ("cuda", "a GPU") if torch.cuda.is_available() else ("cpu", "a CPU")
    options.quiet()
    load = from_pretrained if sparse else load_dense
    with options.err.status("loading the model ..."):
        try:
            loaded = load(path, dtype="auto", **hub).to(device)
        except CatsError as error:
            return {"none": str(error)}
    if sparse and not is_quantised(loaded):
        fuse_(loaded)
    chosen = make_engine("auto", loaded).name
    engines: dict[str, object] = {}
    for name in ENGINES:
        try:
            make_engine(name, loaded)
        except CatsError as error:
            engines[name] = str(error)
        else:
            engines[name] = f"works if you name it; on {place} {chosen} is taken"
    return engines | {chosen: "is taken"}
