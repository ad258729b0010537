"""LoRA on a sparse model: add adapters, save them, load them, merge them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import safetensors
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cats.card import write_card
from cats.checkpoint import first_line, from_pretrained, load_dense
from cats.config import CatsConfig
from cats.errors import ConfigError, ModelMismatchError, StorageError, UnsupportedModelError
from cats.finetuning.options import FinetuneOptions
from cats.fusion import fused_mlps
from cats.model import CatsActivation, find_gated_mlps
from cats.protocols import CausalModel, Tokenizer
from cats.storage import replacing
from cats.undo import unchanged_on_error
from cats.weights import QuantisedLinear, weight_of

if TYPE_CHECKING:
    from peft import PeftModel

# Layers that compute queries and values, alone or stacked with keys.
_ATTENTION_LAYERS = ("q_proj", "v_proj", "qkv_proj")
_THRESHOLDS = "thresholds.safetensors"
NOT_MERGED = (
    "adapters are not merged into quantised weights, which would round them: keep them beside the "
    "model, or merge them into its 16-bit weights and quantise again"
)


def target_layers(model: nn.Module) -> list[str]:
    """Names of the layers that get adapters: queries, values, and those of the gated MLPs.

    Raises:
        UnsupportedModelError: If the model has no gated MLP.
        ConfigError: If no layer for queries is known by its name.
    """
    names = {name for mlp in find_gated_mlps(model) for name in mlp.matrices}
    layers = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    attention = layers & {*_ATTENTION_LAYERS}
    if not attention:
        raise ConfigError(
            f"{type(model).__name__} has no layer named {', '.join(_ATTENTION_LAYERS)}: "
            "name the layers that get adapters with targets"
        )
    return sorted(names | attention)


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raise ConfigError for a target that is neither the name of a module nor its end."""
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


def add_adapters(
    model: nn.Module, options: FinetuneOptions, *, same_dtype: bool = False
) -> PeftModel:
    """Wrap the model, with new LoRA adapters and frozen base weights.

    Args:
        model: A sparse or dense model.
        options: Rank, alpha, dropout, targets and seed.
        same_dtype: Whether adapters have the dtype of the model, instead of float32.

    Raises:
        UnsupportedModelError: If the model is fused: its operator would ignore adapters.
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
    _allow_codes(config)
    try:
        with _without_warnings():
            wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=not same_dtype)
            return cast("PeftModel", wrapped)
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
    """Within the block, thresholds are off and adapters are on."""
    activations = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if isinstance(module, CatsActivation)
    ]
    try:
        for parent, name, act in activations:
            setattr(parent, name, act.dense)
        yield
    finally:
        for parent, name, act in activations:
            setattr(parent, name, act)


@contextmanager
def dense_teacher(model: nn.Module) -> Iterator[None]:
    """Within the block, a model with adapters computes what its dense base computes.

    The adapters and the thresholds are off; no weight is copied.
    """
    peft_model = cast("PeftModel", unwrapped(model))
    with dense_activations(model), peft_model.disable_adapter():
        yield


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP or FSDP."""
    from accelerate.utils import extract_model_from_parallel

    return cast(nn.Module, extract_model_from_parallel(model))


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a ``PeftModel``; any other model itself."""
    if not hasattr(model, "get_base_model"):
        return model
    return cast("PeftModel", model).get_base_model()


def save_adapter(
    model: nn.Module,
    thresholds: CatsConfig | None,
    path: Path,
    *,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write an ordinary PEFT adapter and, in the same folder, the thresholds of its training.

    The folder appears when it is complete.

    Args:
        model: A ``PeftModel``.
        thresholds: Those of the sparse base model; None for a dense one.
        path: The folder; it must not exist, or be empty.
        state: All weights, if they were gathered from several processes.

    Raises:
        StorageError: If it cannot be written.
    """
    with replacing(path, directory=True) as temporary:
        kwargs: dict[str, Any] = {} if state is None else {"state_dict": state}
        # "auto" would ask the hub whether the vocabulary was changed
        cast("PeftModel", model).save_pretrained(
            str(temporary), save_embedding_layers=False, **kwargs
        )
        if thresholds is not None:
            thresholds.save(temporary / _THRESHOLDS)


def load_adapter(base: str | Path, adapter: str | Path, **kwargs: Any) -> PeftModel:
    """Load a base model and an adapter of ``cats finetune``, in evaluation mode.

    Args:
        base: The model that was fine-tuned: a folder, a Hugging Face id, or ``"smollm2"``.
        adapter: Folder of the adapter; thresholds in it are applied to the base model.
        **kwargs: Passed to ``from_pretrained`` of the base model, such as ``dtype="auto"``.

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


def put_adapter(model: nn.Module, adapter: str | Path) -> PeftModel:
    """Wrap the model with a stored adapter; a call that fails leaves the model as it was.

    Raises:
        StorageError: If the adapter cannot be read.
        ModelMismatchError: If it was trained on another model.
        UnsupportedModelError: If the model is fused.
    """
    refuse_fused(model)
    peft = import_peft()
    with unchanged_on_error(model), _without_warnings():
        try:
            config = peft.PeftConfig.from_pretrained(str(adapter))
            _allow_codes(config)
            wrapped = peft.PeftModel.from_pretrained(model, str(adapter), config=config)
            return cast("PeftModel", wrapped)
        except (OSError, safetensors.SafetensorError) as error:
            raise StorageError(f"{adapter}: cannot be read: {first_line(error)}") from error
        except (ValueError, RuntimeError) as error:
            # the adapter names missing layers, or its weights have other sizes
            message = " ".join(str(error).split())
            raise ModelMismatchError(
                f"{adapter} was trained on another model: {message[:200]}"
            ) from error


def merge(model: nn.Module) -> nn.Module:
    """Add the adapters to the weights, in place, and return the model without adapters.

    A call that fails leaves the model as it was. For this, a copy of the weights that have adapters
    stays in the memory of the host until the call ends.

    Raises:
        UnsupportedModelError: If the weights are codes.
    """
    layers = [layer for _, layer in _adapted_layers(model)]
    if any(isinstance(layer.get_base_layer(), QuantisedLinear) for layer in layers):
        raise UnsupportedModelError(NOT_MERGED)
    weights = {
        parameter: parameter.detach().to("cpu", copy=True)
        for layer in layers
        for parameter in layer.get_base_layer().parameters()
    }
    merged_before = [(layer, list(layer.merged_adapters)) for layer in layers]
    # Any: PEFT finds this method of the tuner by __getattr__
    peft_model: Any = model
    try:
        with unchanged_on_error(model):
            merged: nn.Module = peft_model.merge_and_unload()
    except BaseException:
        with torch.no_grad():
            for parameter, weight in weights.items():
                parameter.copy_(weight)
        for layer, names in merged_before:
            layer.merged_adapters[:] = names
        raise
    vars(merged).pop("peft_config", None)
    return merged


def remove_adapters_(model: nn.Module) -> nn.Module:
    """Replace layers with adapters by their base layers, in place; weights do not change."""
    for name, layer in _adapted_layers(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    # PEFT would warn that the model has adapters
    vars(model).pop("peft_config", None)
    return model.requires_grad_(True)


def save_model(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    path: Path,
    *,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint that :func:`cats.from_pretrained` loads; it appears when it is complete.

    Raises:
        StorageError: If it cannot be written.
    """
    with replacing(path, directory=True) as temporary:
        kwargs: dict[str, Any] = {} if state is None else {"state_dict": state}
        cast(PreTrainedModel, model).save_pretrained(temporary, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        config = cast(CausalModel, model).config
        if block := getattr(config, "cats", None):
            write_card(temporary, block, base=config.name_or_path)


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Name and layer of each layer with adapters; Any, since PEFT types them incompletely."""
    layer_class = import_peft().tuners.tuners_utils.BaseTunerLayer
    return [(n, module) for n, module in model.named_modules() if isinstance(module, layer_class)]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide what PEFT says of a name that transformers has renamed, and of our quantised layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type .*QuantisedLinear", UserWarning)
        yield


def _allow_codes(config: Any) -> None:
    """Let PEFT put adapters on quantised layers; what runs below them is the layer itself."""
    if hasattr(config, "_register_custom_module"):
        lora: Any = import_peft().tuners.lora.layer
        config._register_custom_module({QuantisedLinear: lora.Linear})


def import_peft() -> ModuleType:
    """The package ``peft``.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("adapters need PEFT: pip install 'cats-llm[finetune]'") from error
    return peft
