"""Load a sparse model: an ordinary checkpoint with threshold tensors beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from cats.apply import sparsify_
from cats.config import CatsConfig
from cats.errors import ConfigError, FormatError, StorageError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_THRESHOLD = ".threshold"
# Files by which a folder of fine-tuning is told from that of a model.
_MARKS = ("adapter_config.json", "history.jsonl", "config.json")


def from_pretrained(
    path: str | Path, *, thresholds: str | Path | CatsConfig | None = None, **kwargs: Any
) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` and the thresholds, in evaluation mode.

    Args:
        path: Folder or Hugging Face id of a sparse checkpoint; of a dense one with ``thresholds``.
        thresholds: A thresholds file that ``cats calibrate`` or ``CatsConfig.save`` wrote, or a
            config.
        **kwargs: Passed on, such as ``dtype="auto"`` or ``device_map="auto"``.

    Raises:
        StorageError: If the model or the thresholds file cannot be read.
        ConfigError: If the checkpoint is dense and no thresholds are given.
        FormatError: If a file is corrupt, truncated or of a newer release.
        ModelMismatchError: If the thresholds belong to another model.
    """
    if isinstance(thresholds, CatsConfig):
        config = thresholds
    elif thresholds is not None:
        config = CatsConfig.load(thresholds)
    else:
        config = read_config(path, **_hub_options(kwargs))
    return sparsify_(load_dense(path, **kwargs), config)


def load_dense(path: str | Path, **kwargs: Any) -> Any:
    """The dense model of a checkpoint, in evaluation mode; thresholds in it are left aside.

    Raises:
        StorageError: If there is no such model or its files are damaged.
        FormatError: If weights are missing or of another size than the config says.
    """
    verbosity = hf_logging.get_verbosity()
    # the load report names the thresholds as unexpected; what else is wrong is raised below
    hf_logging.set_verbosity_error()
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(str(path), output_loading_info=True, **kwargs)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise StorageError(f"cannot load the model {path}: {first_line(error)}") from error
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise FormatError(f"{path}: its weights have other sizes than config.json says") from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = [*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])]
        raise FormatError(f"{path}: {len(wrong)} weights are missing or misfit, such as {wrong[0]}")
    if hasattr(model.config, "cats"):
        del model.config.cats
    return model


def read_config(path: str | Path, **hub_options: Any) -> CatsConfig:
    """The thresholds that lie in a sparse checkpoint.

    Raises:
        ConfigError: If the checkpoint is dense.
        FormatError: If its ``cats`` block or a threshold is missing, or of a newer release.
    """
    block = getattr(_load_config(path, hub_options), "cats", None)
    if block is None:
        raise ConfigError(
            f"{path} is a dense checkpoint: give thresholds=FILE, or make one with "
            f"cats calibrate {path} -o FILE.safetensors"
        )
    tensors = _read_thresholds(path, hub_options)
    if not tensors:
        raise FormatError(f"{path}: config.json has a cats block, but no thresholds are stored")
    return CatsConfig.from_dict(block, tensors, source=str(path))


def is_sparse_checkpoint(path: str | Path) -> bool:
    """Whether the checkpoint's ``config.json`` has a ``cats`` block."""
    return getattr(_load_config(path, {}), "cats", None) is not None


def _load_config(path: str | Path, hub_options: dict[str, Any]) -> Any:
    if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise StorageError(f"cannot load the model {path}: no such folder")
    has = {name for name in _MARKS if (Path(path) / name).is_file()}
    if has == {"adapter_config.json"}:
        raise StorageError(
            f"{path}: holds an adapter, not a model: cats.finetuning.load_adapter puts it on its "
            "base, cats finetune --merge writes both as one"
        )
    if has == {"history.jsonl"}:
        raise StorageError(f"{path}: the folder of a fine-tuning: name merged/ or model/ in it")
    try:
        return AutoConfig.from_pretrained(str(path), **hub_options)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot load the model {path}: {first_line(error)}") from error


def _read_thresholds(path: str | Path, hub_options: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    keys = _stored_keys(path, hub_options)
    prefixes = [key.removesuffix(_THRESHOLD) for key in keys if key.endswith(_THRESHOLD)]
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, file in keys.items():
        prefix, _, name = key.rpartition(".")
        if prefix in prefixes:
            with safetensors.safe_open(file, "pt") as shard:
                tensors.setdefault(prefix.rpartition(".")[0], {})[name] = shard.get_tensor(key)
    return tensors


def _stored_keys(path: str | Path, hub_options: dict[str, Any]) -> dict[str, str]:
    """Each stored tensor's name to the file that holds it."""

    def find(name: str) -> str | None:
        file: str | None = cached_file(
            str(path), name, _raise_exceptions_for_missing_entries=False, **hub_options
        )
        return file

    try:
        if index := find(_INDEX):
            shards = json.loads(Path(index).read_text())["weight_map"]
            files = {name: find(name) for name in set(shards.values())}
            return {key: file for key, shard in shards.items() if (file := files[shard])}
        single = find(_SINGLE)
        if single is None:
            raise StorageError(f"{path}: has no {_SINGLE}; CATS reads safetensors only")
        with safetensors.safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise FormatError(f"{path}: not a whole checkpoint ({error}); save it again") from error


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    return {name: kwargs[name] for name in names if name in kwargs}


def first_line(error: Exception) -> str:
    """The first line of another library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
