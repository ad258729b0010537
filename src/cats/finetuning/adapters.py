"""LoRA on a sparse model: add adapters, save them, load them, merge them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from cats.checkpoint import first_line, from_pretrained, load_dense
from cats.config import CatsConfig
from cats.errors import ConfigError, ModelMismatchError, StorageError, UnsupportedModelError
from cats.finetuning.options import FinetuneOptions
from cats.fusion import fused_mlps
from cats.model import CatsActivation, find_gated_mlps
from cats.storage import replacing
from cats.undo import unchanged_on_error
from cats.weights import weight_of

# Layers that give queries and values: alone, or stacked with keys.
_ATTENTION = ("q_proj", "v_proj", "qkv_proj")
_THRESHOLDS = "thresholds.safetensors"


def target_layers(model: nn.Module) -> list[str]:
    """Names of the layers that get adapters: queries, values, and those of the gated MLPs.

    Raises:
        UnsupportedModelError: If the model has no gated MLP.
        ConfigError: If no layer for queries is known by its name.
    """
    names = {name for mlp in find_gated_mlps(model) for name in mlp.matrices}
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()} & {*_ATTENTION}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no layer named {', '.join(_ATTENTION)}: "
            "name the layers that get adapters with targets"
        )
    return sorted(names | found)


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raise ConfigError for a target that no module's name is or ends with."""
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            layers = {
                n.rpartition(".")[2] for n, m in model.named_modules() if weight_of(m) is not None
            }
            raise ConfigError(
                f"no adapters on {target!r}: the model has no layer of this name; its layers are "
                f"named {', '.join(sorted(layers))}"
            )


def add_adapters(model: Any, options: FinetuneOptions, *, same_dtype: bool = False) -> Any:
    """The model as a ``peft.PeftModel`` with fresh LoRA adapters; base weights are frozen.

    Args:
        model: A sparse or dense model.
        options: Rank, alpha, dropout, targets and seed.
        same_dtype: Whether adapters have the dtype of the model, instead of float32.

    Raises:
        UnsupportedModelError: If the model is fused: an operator sees no adapter.
        ConfigError: If PEFT is not installed.
    """
    peft = import_peft()
    refuse_fused(model)
    check_targets(model, options.targets)
    torch.manual_seed(options.seed)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets) or target_layers(model),
        task_type="CAUSAL_LM",
    )
    try:
        with _without_renames():
            return peft.get_peft_model(model, config, autocast_adapter_dtype=not same_dtype)
    except ValueError as error:
        raise ConfigError(f"no adapters on {', '.join(options.targets)}: {error}") from error


def refuse_fused(model: nn.Module) -> None:
    """Raise UnsupportedModelError if an MLP of the model is fused."""
    for name, _ in fused_mlps(model):
        raise UnsupportedModelError(
            f"{name} is fused, and a fused MLP has no gradient: call cats.unfuse_(model) first"
        )


@contextmanager
def dense_activations(model: nn.Module) -> Iterator[None]:
    """Within the block thresholds are off, and adapters are on."""
    found = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if isinstance(module, CatsActivation)
    ]
    try:
        for parent, name, act in found:
            setattr(parent, name, act.dense)
        yield
    finally:
        for parent, name, act in found:
            setattr(parent, name, act)


@contextmanager
def dense_teacher(model: nn.Module) -> Iterator[None]:
    """Within the block, a model with adapters computes what its dense base computes.

    The adapters and the thresholds are off; no weight is copied.
    """
    with dense_activations(model), unwrapped(model).disable_adapter():
        yield


def unwrapped(model: Any) -> Any:
    """The model inside DDP or FSDP."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def save_adapter(
    model: Any, thresholds: CatsConfig | None, path: Path, *, state: dict[str, Tensor] | None = None
) -> None:
    """Write an ordinary PEFT adapter and, beside it, the thresholds that it was trained with.

    The folder appears when it is complete.

    Args:
        model: A ``PeftModel``.
        thresholds: Those of the sparse base; None for a dense one.
        path: The folder; must not exist or be empty.
        state: All weights, if they were gathered from several processes.

    Raises:
        StorageError: If it cannot be written.
    """
    with replacing(path, directory=True) as temporary:
        kwargs = {} if state is None else {"state_dict": state}
        # "auto" would ask the hub whether the vocabulary was changed
        model.save_pretrained(temporary, save_embedding_layers=False, **kwargs)
        if thresholds is not None:
            thresholds.save(temporary / _THRESHOLDS)


def load_adapter(base: str | Path, adapter: str | Path, **kwargs: Any) -> Any:
    """A model with the adapter that ``cats finetune`` wrote, in evaluation mode.

    Args:
        base: The model that was fine-tuned: a folder, a Hugging Face id, or ``"smollm2"``.
        adapter: Folder of the adapter; thresholds in it are applied to the base.
        **kwargs: Passed to ``from_pretrained`` of the base, such as ``dtype="auto"``.

    Raises:
        StorageError: If either cannot be read.
        ModelMismatchError: If the adapter was trained on another model.
    """
    thresholds = Path(adapter) / _THRESHOLDS
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise StorageError(f"{adapter}: holds no adapter")
    if thresholds.is_file():
        model = from_pretrained(base, thresholds=thresholds, **kwargs)
    else:
        model = load_dense(base, **kwargs)
    return put_adapter(model, adapter).eval()


def put_adapter(model: Any, adapter: str | Path) -> Any:
    """The model with the stored adapter on it; a call that fails leaves the model as it was.

    Raises:
        StorageError: If the adapter cannot be read.
        ModelMismatchError: If it was trained on another model.
        UnsupportedModelError: If the model is fused.
    """
    refuse_fused(model)
    peft = import_peft()
    with unchanged_on_error(model), _without_renames():
        try:
            return peft.PeftModel.from_pretrained(model, str(adapter))
        except (OSError, safetensors.SafetensorError) as error:
            raise StorageError(f"{adapter}: cannot be read: {first_line(error)}") from error
        except (ValueError, RuntimeError) as error:
            # layers that the model does not have, or of other sizes
            message = " ".join(str(error).split())
            raise ModelMismatchError(
                f"{adapter} was trained on another model: {message[:200]}"
            ) from error


def merge(model: Any) -> Any:
    """The model with its adapters added to its weights, in place; it has no adapters then.

    A call that fails leaves the model as it was. For this, a copy of the weights that have adapters
    is kept in the memory of the host until the call ends.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, import_peft().tuners.tuners_utils.BaseTunerLayer)
    ]
    weights = {
        p: p.detach().to("cpu", copy=True) for m in layers for p in m.get_base_layer().parameters()
    }
    merged_before = [(m, list(m.merged_adapters)) for m in layers]
    try:
        with unchanged_on_error(model):
            merged = model.merge_and_unload()
    except BaseException:
        with torch.no_grad():
            for parameter, weight in weights.items():
                parameter.copy_(weight)
        for layer, names in merged_before:
            layer.merged_adapters[:] = names
        raise
    vars(merged).pop("peft_config", None)
    return merged


def remove_adapters_(model: Any) -> Any:
    """Put the base layers of a model back, in place; its weights do not change."""
    layers = import_peft().tuners.tuners_utils.BaseTunerLayer
    for name, module in list(model.named_modules()):
        if isinstance(module, layers):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    # PEFT would warn that the model has adapters
    vars(model).pop("peft_config", None)
    return model.requires_grad_(True)


def save_model(
    model: Any, tokenizer: Any, path: Path, *, state: dict[str, Tensor] | None = None
) -> None:
    """Write a checkpoint that :func:`cats.from_pretrained` loads; it appears when it is complete.

    Raises:
        StorageError: If it cannot be written.
    """
    with replacing(path, directory=True) as temporary:
        model.save_pretrained(temporary, **({} if state is None else {"state_dict": state}))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


@contextmanager
def _without_renames() -> Iterator[None]:
    """Hide a warning: PEFT uses names of attributes that newer transformers warn about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def import_peft() -> Any:
    """The package ``peft``.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("adapters need PEFT: pip install 'cats-llm[finetune]'") from error
    return peft
