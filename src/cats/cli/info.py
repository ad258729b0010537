"""``cats info``: what is installed, and what a model or a file that cats wrote holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats.cli import options

if TYPE_CHECKING:
    from cats.config import CatsConfig


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a Hugging Face id, [b]smollm2[/b], a file of thresholds or statistics, "
            "or what [b]cats finetune[/b] wrote.",
            show_default="this installation",
        ),
    ] = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Versions and backends of this installation, or what a model or file holds.

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


def _installation() -> dict[str, dict[str, Any]]:
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


def _backends() -> dict[str, str]:
    import cats

    found = dict(cats.ops.backends())
    clone = Path(cats.__file__).parents[2]
    if found["cpu"] != "live" and (clone / "setup.py").is_file():
        found["cpu"] += f"; to build them in this clone: pip install -e {clone}"
    return found


def _describe(model: str, hub: dict[str, Any]) -> dict[str, dict[str, Any]]:
    from cats.checkpoint import is_sparse_checkpoint, load_config, read_config
    from cats.config import CatsConfig
    from cats.errors import ConfigError
    from cats.storage import load_tensors

    name = Path(model).name
    if hub and Path(model).is_file():
        raise ConfigError(f"{model} is a file: options of the hub are for a model")
    # statistics may have any name; no model is a file
    if model.endswith(".safetensors") or (Path(model).is_file() and not model.endswith(".jsonl")):
        _, block = load_tensors(model)
        if block.get("kind") == "statistics":
            return _describe_statistics(model)
        return _describe_config(name, CatsConfig.load(model))
    if (Path(model) / "adapter_config.json").is_file():
        return _describe_adapter(Path(model))
    history = Path(model) / "history.jsonl" if Path(model).is_dir() else Path(model)
    if history.suffix == ".jsonl" and history.is_file():
        return _describe_history(name, history)
    path = options.resolve(model, **hub)
    sparse, config = is_sparse_checkpoint(path, **hub), load_config(path, **hub)
    dense = {name: {"thresholds": "none: a dense model"}}
    return {
        **(_describe_config(name, read_config(path, **hub)) if sparse else dense),
        "architecture": _architecture(config, **hub),
        "engines of cats.generate": _engines(path, config, hub, sparse=sparse),
    }


def _architecture(config: Any, *, trust_remote_code: bool = False, **_: Any) -> dict[str, Any]:
    """Sizes of a model, from its configuration alone."""
    from cats.errors import UnsupportedModelError
    from cats.recipes.description import architecture

    try:
        found = architecture(config, trust_remote_code=trust_remote_code)
    except UnsupportedModelError as error:
        return {"none": str(error)}
    about = {
        name: getattr(found, name)
        for name in ("model", "layers", "hidden_size", "parameters", "dtype")
    }
    if found.refusal:
        return about | {"gated_mlps": f"none: {found.refusal}"}
    return about | {
        "gated_mlps": found.gated_mlps,
        "intermediate_size": _one_or_all(found.intermediate_sizes),
        "activation": _one_or_all(found.activations),
    }


def _one_or_all(values: Sequence[Any]) -> Any:
    """The value that all have, or each that occurs, as words."""
    return values[0] if len(values) == 1 else ", ".join(map(str, values))


def _describe_config(title: str, config: CatsConfig) -> dict[str, dict[str, Any]]:
    block = config.to_dict()
    realized = block.pop("realized_sparsity")
    shares = {name: f"{share:.1%}" for name, share in realized.items()}
    same = len({*shares.values()}) == 1 and shares.keys() == config.thresholds.keys()
    if same:
        block["dropped in calibration"] = f"{next(iter(shares.values()))} in each MLP"
    thresholds = {
        name: f"threshold {float(t.mean()):.4f}"
        + (f", {shares[name]} dropped in calibration" if name in shares and not same else "")
        for name, t in _by_layer(config.thresholds).items()
    }
    return {title: block, "MLPs": thresholds}


def _describe_adapter(folder: Path) -> dict[str, dict[str, Any]]:
    from cats.config import CatsConfig
    from cats.errors import FormatError

    try:
        block = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        about = {
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


def _describe_history(title: str, path: Path) -> dict[str, dict[str, Any]]:
    from cats.history import History

    found = History.load(path)
    settings, last = found.settings, found.points[-1] if found.points else None
    about = {
        "kind": "fine-tuning",
        "model": settings.get("model"),
        "method": settings["method"],
        "target_sparsity": settings["target_sparsity"],
        "steps": f"{last.step if last else 0:,} of {settings['options']['steps']:,}",
        "complete": "yes" if found.complete else "no: the same command continues it",
    }
    losses = {
        name: f"log-perplexity {found.points[0].losses[name]:.4f} > {loss:.4f}"
        for name, loss in (last.losses if last else {}).items()
        if name in found.points[0].losses
    }
    return {title: about} | ({"evaluations": losses} if losses else {})


def _describe_statistics(path: str) -> dict[str, dict[str, Any]]:
    from cats.calibration import Statistics

    found = Statistics.load(path)
    about = {
        "kind": "statistics: counts that serve every target sparsity",
        "method": found.method,
        "calibration_tokens": found.tokens,
        "blocks": found.blocks,
        "calibration_hash": f"{found.text_hash:016x}",
    }
    mlps = {
        name: f"{size:,} neurons, {found.activations[name]}, {int(found.counts[name].sum()):,} "
        f"activations in {int(found.counts[name].count_nonzero()):,} bins"
        for name, size in _by_layer(found.sizes).items()
    }
    return {Path(path).name: about, "MLPs": mlps}


def _by_layer(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with layer 2 before layer 10; in files it lies behind."""

    def padded(name: str) -> str:
        return re.sub(r"\d+", lambda number: number[0].zfill(6), name)

    return {name: values[name] for name in sorted(values, key=padded)}


def _engines(path: str, config: Any, hub: dict[str, Any], *, sparse: bool) -> dict[str, str]:
    """Which engine would decode a model on this machine, and why not another."""
    import torch

    from cats.decode import ENGINES
    from cats.decode.cache import SlotCache
    from cats.decode.engines import make_engine, stream_refusal
    from cats.errors import CatsError, UnsupportedModelError
    from cats.fusion import fuse_

    try:
        SlotCache(config, 1)
    except UnsupportedModelError as error:
        return {"none": str(error)}
    works = "works where it is asked for; on {} {} is taken"
    if not torch.cuda.is_available():
        # there it depends on the device alone
        reason = stream_refusal(torch.device("cpu"))
        return {
            "eager": "is taken",
            "compiled": works.format("a CPU", "eager"),
            "stream": f"the engine stream cannot run: {reason}",
        }
    loaded, _ = options.load(path, dtype=options.Dtype.auto, device="cuda", hub=hub)
    if sparse:
        fuse_(loaded)
    chosen = make_engine("auto", loaded).name
    found = {}
    for name in ENGINES:
        try:
            make_engine(name, loaded)
        except CatsError as error:
            found[name] = str(error)
        else:
            found[name] = works.format("a GPU", chosen)
    return found | {chosen: "is taken"}
