"""What identifies a fine-tuning: settings and hashes, by which a stopped run is recognised."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from cats import fingerprint
from cats.config import CatsConfig
from cats.errors import ConfigError
from cats.finetuning import adapters
from cats.finetuning.data import Blocks, Examples, Pairs, StreamedBlocks, describe
from cats.finetuning.options import FinetuneOptions
from cats.finetuning.processes import world_size
from cats.model import CatsActivation, find_gated_mlps
from cats.protocols import CausalModel, Tokenizer
from cats.results import environment

_DENSE = {"method": "dense", "target_sparsity": None}
# Options that change neither the trained weights nor the measurements.
_WITHOUT_EFFECT = ("save_every", "keep", "report_to", "gradient_checkpointing")


def thresholds_of(model: nn.Module) -> CatsConfig | None:
    """The config of a sparse model, with the thresholds that it has now; None for a dense one."""
    acts = {n: m for n, m in model.named_modules() if isinstance(m, CatsActivation)}
    if not acts:
        return None
    adapters.refuse_fused(model)
    tensors = {n.rpartition(".")[0]: {"threshold": m.threshold.cpu()} for n, m in acts.items()}
    fingerprints = {m.name: m.fingerprint() for m in find_gated_mlps(model, names=tensors)}
    block = cast(CausalModel, model).config.cats
    return CatsConfig.from_dict(block, tensors, fingerprints=fingerprints)


def data_settings(
    train: Examples,
    evaluations: Mapping[str, Blocks | Pairs],
    answers: Mapping[str, Pairs],
    calibration: Tensor | None,
) -> dict[str, object]:
    """Sizes and hashes of all data of a run; for a stream, those of its first block.

    Args:
        train: Examples of the training.
        evaluations: Held-out examples.
        answers: Pairs whose answers are generated.
        calibration: Token ids on which thresholds are calibrated again; None if they are fixed.
    """
    description = describe(train)
    if isinstance(train, StreamedBlocks):
        first = next(iter(train), None)
        description["first"] = None if first is None else fingerprint.of_tokens(first["input_ids"])
    return {
        "train": description,
        "evaluations": {name: describe(examples) for name, examples in evaluations.items()},
        "answers": {name: describe(pairs) for name, pairs in answers.items()},
        "calibration": None if calibration is None else fingerprint.of_tokens(calibration),
    }


def settings_of(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    options: FinetuneOptions,
    data: Mapping[str, object],
    about: Mapping[str, object],
) -> dict[str, Any]:
    """The settings that identify a run, as JSON loads them.

    Args:
        model: The model before it gets adapters.
        tokenizer: Tokenizer of the model, or None.
        options: How it is trained.
        data: From :func:`data_settings`.
        about: Further settings, such as the name of the model.
    """
    causal_model = cast(CausalModel, model)
    block = getattr(causal_model.config, "cats", None) or _DENSE
    thresholds = thresholds_of(model)
    settings = {
        **about,
        "weights": fingerprint.of_model(model),
        "tokenizer": None if tokenizer is None else fingerprint.of_tokenizer(tokenizer),
        "method": block["method"],
        "target_sparsity": block["target_sparsity"],
        "calibration_hash": block.get("calibration_hash"),
        "thresholds": None if thresholds is None else fingerprint.of_thresholds(thresholds),
        "dtype": str(causal_model.dtype).removeprefix("torch."),
        "processes": world_size(),
        "options": options_that_count(options),
        **data,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def options_that_count(options: FinetuneOptions) -> dict[str, Any]:
    """The options that decide the result, as JSON loads them."""
    values = {k: v for k, v in dataclasses.asdict(options).items() if k not in _WITHOUT_EFFECT}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def device_environment(model: nn.Module, commit: str | None = None) -> dict[str, object]:
    """Device and versions of a run, for its history."""
    device = next(model.parameters()).device
    return dict(environment("cpu" if device.type == "cpu" else str(device), commit=commit))


def check_same_run(path: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise an error if a stored history is that of another run.

    Args:
        path: The folder or file, for the message.
        before: The stored settings.
        now: Those of this run.

    Raises:
        ConfigError: If a setting differs, or was not recorded.
    """
    if missing := [name for name in now if name not in before]:
        raise ConfigError(
            f"{path}: holds a run of an older release, which did not record "
            f"{', '.join(missing)}: it may be another run; name another folder, or delete it"
        )
    if differing := differences(before, now):
        raise ConfigError(
            f"{path}: holds a run with other settings ({', '.join(differing)}); "
            "name another folder, or delete it"
        )


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Names of settings that differ; those of nested ones have a dot, such as ``options.seed``."""
    names = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [f"{name}.{inner}" for inner in differences(a, b)]
        elif a != b:
            names.append(name)
    return names
