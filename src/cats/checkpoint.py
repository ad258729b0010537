"""Load a sparse model: an ordinary checkpoint with threshold tensors beside the weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import safetensors
import torch
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of its HTTP library
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from cats import formats, smollm2
from cats.apply import densify_, sparsify_
from cats.config import CatsConfig
from cats.errors import CatsError, ConfigError, FormatError, StorageError
from cats.protocols import ModelConfig, Tokenizer
from cats.weights import INPUT_THRESHOLD

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_THRESHOLD = ".threshold"
# Stands for the name of an activation, which no checkpoint renames.
_NAME = "act_fn"
# Options that say which files of the hub are meant and how to get them. They hold for every file.
_CODE_OPTIONS = ("trust_remote_code", "code_revision")
_FILE_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_HUB_OPTIONS = (*_FILE_OPTIONS, "force_download", "proxies", *_CODE_OPTIONS)
# Files by which the folder of a model, of an adapter and of a fine-tuning are told apart.
_MARKER_FILES = ("adapter_config.json", "history.jsonl", "config.json")


def from_pretrained(
    path: str | Path, *, thresholds: str | Path | CatsConfig | None = None, **kwargs: Any
) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` and the thresholds, in evaluation mode.

    Args:
        path: Folder or Hugging Face id of a sparse checkpoint, of a dense one with ``thresholds``,
            or ``"smollm2"`` (:func:`locate`).
        thresholds: A thresholds file that ``cats calibrate`` or ``CatsConfig.save`` wrote, or a
            config.
        **kwargs: Passed on, such as ``dtype="auto"`` or ``device_map="auto"``. Those that say
            where files come from (``revision``, ``subfolder``, ``token``, ``cache_dir``, ...) hold
            for the thresholds of the checkpoint too.

    Raises:
        StorageError: If the model or the thresholds file cannot be read.
        ConfigError: If the checkpoint is dense and no thresholds are given.
        FormatError: If a file is corrupt, truncated or from a newer release.
        ModelMismatchError: If the thresholds belong to another model.
    """
    if isinstance(thresholds, CatsConfig):
        config = thresholds
    elif thresholds is not None:
        config = CatsConfig.load(thresholds)
    else:
        config = read_config(path, variant=kwargs.get("variant"), **hub_options(kwargs))
    return sparsify_(load_dense(path, **kwargs), config)


def load_dense(path: str | Path, **kwargs: Any) -> Any:
    """The dense model of a checkpoint, in evaluation mode; thresholds in it are ignored.

    Raises:
        StorageError: If there is no such model or its files are damaged.
        FormatError: If weights are missing, or have other sizes than the config says.
    """
    folder, of_gguf = _split(locate(path, **hub_options(kwargs)))
    verbosity = hf_logging.get_verbosity()
    # transformers would report the thresholds as unexpected; other faults are raised below
    hf_logging.set_verbosity_error()
    try:
        model, info = formats.load(folder, hub_options(kwargs), **of_gguf, **kwargs)
    except CatsError:
        raise
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
        raise FormatError(
            f"{path}: {len(wrong)} weights are missing or have the wrong size, such as {wrong[0]}"
        )
    # after cats.register(), transformers itself applies them
    densify_(model)
    return model


def read_config(path: str | Path, *, variant: str | None = None, **hub_options: Any) -> CatsConfig:
    """The thresholds that a sparse checkpoint holds.

    Args:
        path: As for :func:`from_pretrained`.
        variant: Which files of weights to read, such as ``"fp16"`` for ``model.fp16.safetensors``.
        **hub_options: As for ``from_pretrained``: revision, subfolder, token, cache_dir, ...

    Raises:
        ConfigError: If the checkpoint is dense.
        FormatError: If its ``cats`` block or a threshold is missing, or from a newer release.
    """
    folder = locate(path, **hub_options)
    block = getattr(_load_config(folder, hub_options), "cats", None)
    if block is None:
        raise ConfigError(
            f"{path} is a dense checkpoint: give thresholds=FILE, or make one with "
            f"cats calibrate {path} -o FILE.safetensors; to load it dense, call "
            f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
        )
    tensors, inputs = _read_thresholds(folder, variant, hub_options)
    if set(block.get("realized_sparsity", ())) - tensors.keys():
        renamed = _renaming_of_modules(folder, hub_options)
        tensors = {renamed(mlp): named for mlp, named in tensors.items()}
        inputs = {renamed(layer): tensor for layer, tensor in inputs.items()}
    if not tensors:
        raise FormatError(f"{path}: config.json has a cats block, but no thresholds are stored")
    return CatsConfig.from_dict(block, tensors, inputs=inputs, source=str(path))


def is_sparse_checkpoint(path: str | Path, **hub_options: Any) -> bool:
    """Whether the checkpoint's ``config.json`` has a ``cats`` block.

    Args:
        path: As for :func:`from_pretrained`.
        **hub_options: As for ``from_pretrained``: revision, subfolder, token, cache_dir, ...
    """
    config = load_config(path, **hub_options)
    return getattr(config, "cats", None) is not None


def load_config(path: str | Path, **hub_options: Any) -> ModelConfig:
    """The configuration of a model, as transformers loads it.

    Raises:
        StorageError: If there is none.
    """
    return _load_config(locate(path, **hub_options), hub_options)


def load_tokenizer(path: str | Path, **hub_options: Any) -> Tokenizer:
    """
    Raises:
        StorageError: If there is none, or it cannot be read.
    """
    folder, of_gguf = _split(locate(path, **hub_options))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **of_gguf, **hub_options)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot load the tokenizer of {path}: {first_line(error).rstrip(': ')}. If there is "
            "none, save it beside the model: tokenizer.save_pretrained(FOLDER)"
        ) from error
    if of_gguf:
        formats.mend_tokenizer_(tokenizer, Path(folder) / of_gguf["gguf_file"])
    return cast(Tokenizer, tokenizer)


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options of ``from_pretrained`` that hold for every file that is loaded."""
    return {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}


def locate(path: str | Path, **hub_options: Any) -> str:
    """The folder, GGUF file or Hugging Face id behind the name of a model.

    The string ``"smollm2"`` is the built-in model of :mod:`cats.smollm2`, even if there is a folder
    of that name; ``"./smollm2"`` is the folder. ``"smollm2-gguf"`` is its GGUF file, in codes.

    Args:
        path: Folder, GGUF file, Hugging Face id, ``"smollm2"`` or ``"smollm2-gguf"``.
        **hub_options: As for ``from_pretrained``: revision, token, cache_dir, ...

    Raises:
        StorageError: If there is no such folder, and no such model in the cache or on the hub.
        FormatError: If the built-in model is damaged.
    """
    name = str(path)
    if path in (smollm2.NAME, smollm2.GGUF_NAME) or Path(name).is_dir():
        if hub_options.get("revision") not in (None, "main"):
            raise StorageError(
                f"cannot load the model {name} at revision {hub_options['revision']}: it is a "
                "folder, and only models of the Hugging Face hub have revisions"
            )
        if path == smollm2.GGUF_NAME:
            return str(smollm2.gguf_file())
        return str(smollm2.checkpoint()) if path == smollm2.NAME else name
    if formats.split(name) is not None:
        return name
    if Path(name).is_file():
        raise StorageError(f"cannot load the model {name}: a file, expected a folder or a .gguf")
    if name.startswith(("/", ".", "~")):
        raise StorageError(f"cannot load the model {name}: no such folder")
    if reason := _missing_on_hub(name, **hub_options):
        raise StorageError(
            f"cannot load the model {name}: no folder of that name, and {reason}; "
            f"{smollm2.NAME} is the built-in model"
        )
    return name


def _missing_on_hub(
    name: str,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    **_: Any,
) -> str | None:
    """Why a model is neither in the cache nor on the hub; the hub is asked once.

    Without a network, transformers would try for half a minute before it fails.
    """
    file = f"{subfolder}/config.json" if subfolder else "config.json"
    try:
        if huggingface_hub.try_to_load_from_cache(name, file, cache_dir, revision):
            return None
        if local_files_only:
            return "not in the cache of the Hugging Face hub"
        url = huggingface_hub.hf_hub_url(name, file, revision=revision)
        huggingface_hub.get_hf_file_metadata(url, token=token)
    except HFValidationError:
        return "no name of a model on the Hugging Face hub"
    except OfflineModeIsEnabled:
        return "not in the cache of the Hugging Face hub, which HF_HUB_OFFLINE forbids to ask"
    except HfHubHTTPError as error:
        # transformers handles all other answers: it tries again or says what to do
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            return "not on the Hugging Face hub (a private model needs a token)"
    except HTTPError as error:
        return f"the Hugging Face hub cannot be reached ({first_line(error)})"
    return None


def _load_config(path: str, hub_options: dict[str, Any]) -> ModelConfig:
    path, of_gguf = _split(path)
    folder = Path(path) / hub_options.get("subfolder", "")
    markers = {name for name in _MARKER_FILES if (folder / name).is_file()}
    if not of_gguf and markers == {"adapter_config.json"}:
        raise StorageError(
            f"{path}: holds an adapter, not a model: cats.finetuning.load_adapter puts it on its "
            "base, cats finetune --merge writes both as one"
        )
    if markers == {"history.jsonl"}:
        raise StorageError(f"{path}: the folder of a fine-tuning: name merged/ or model/ in it")
    try:
        return cast(ModelConfig, AutoConfig.from_pretrained(path, **of_gguf, **hub_options))
    except (OSError, ValueError, struct.error) as error:
        raise StorageError(f"cannot load the model {path}: {first_line(error)}") from error


def _split(path: str) -> tuple[str, dict[str, str]]:
    """A folder, and the option that names a GGUF file in it; any other path as it is."""
    found = formats.split(path)
    return (path, {}) if found is None else (found[0], {"gguf_file": found[1]})


def _read_thresholds(
    path: str, variant: str | None, hub_options: dict[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Thresholds of each MLP by their names, and those of the inputs of linear layers."""
    keys = _stored_keys(path, variant, hub_options)
    prefixes = [key.removesuffix(_THRESHOLD) for key in keys if key.endswith(_THRESHOLD)]
    tensors: dict[str, dict[str, Tensor]] = {}
    inputs: dict[str, Tensor] = {}
    for key, file in keys.items():
        prefix, _, name = key.rpartition(".")
        if prefix not in prefixes and name != INPUT_THRESHOLD:
            continue
        with safetensors.safe_open(file, "pt") as shard:
            tensor = shard.get_tensor(key)
        if name == INPUT_THRESHOLD:
            inputs[prefix] = tensor
        else:
            tensors.setdefault(prefix.rpartition(".")[0], {})[name] = tensor
    return tensors, inputs


def _renaming_of_modules(path: str, hub_options: dict[str, Any]) -> Callable[[str], str]:
    """Gives a module its own name, where transformers saves weights under another one.

    It writes the names of a family's first checkpoints, such as those of Mixtral's experts.
    """
    trust_remote_code = bool(hub_options.get("trust_remote_code"))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            _load_config(path, hub_options), trust_remote_code=trust_remote_code
        )
    renamings = [c for c in get_model_conversion_mapping(empty) if isinstance(c, WeightRenaming)]

    def renamed(module: str) -> str:
        # patterns may end in a dot, after which the name of a weight follows
        key = f"{module}.{_NAME}"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        return key.removesuffix(f".{_NAME}")

    return renamed


def _stored_keys(path: str, variant: str | None, hub_options: dict[str, Any]) -> dict[str, str]:
    """Name of each stored tensor to its file."""
    single_name, index_name = _SINGLE, _INDEX
    if variant is not None:
        single_name = f"model.{variant}.safetensors"
        index_name = f"model.safetensors.index.{variant}.json"
    file_options = {n: value for n, value in hub_options.items() if n not in _CODE_OPTIONS}

    def find(name: str) -> str | None:
        file: str | None = cached_file(
            path, name, _raise_exceptions_for_missing_entries=False, **file_options
        )
        return file

    try:
        if index := find(index_name):
            shards = json.loads(Path(index).read_text())["weight_map"]
            files = {name: find(name) for name in set(shards.values())}
            return {key: file for key, shard in shards.items() if (file := files[shard])}
        single = find(single_name)
        if single is None:
            raise StorageError(f"{path}: has no {single_name}; CATS reads safetensors only")
        with safetensors.safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise FormatError(f"{path}: not a whole checkpoint ({error}); save it again") from error


def first_line(error: Exception) -> str:
    """The first line of another library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
