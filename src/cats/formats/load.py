"""Load a quantised checkpoint with its codes: transformers reads the files, and we the layers.

A quantiser of transformers puts modules with the checkpoint's own tensors in the place of linear
layers, so that devices, dtypes, shards and the hub work as for any model. When they are filled,
each becomes a :class:`QuantisedLinear`, and ``save_pretrained`` asks the quantiser for the tensors
of the checkpoint again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cats.errors import FormatError, UnsupportedModelError
from cats.formats import gguf
from cats.formats.awq import AWQ
from cats.formats.base import Format, Layer
from cats.formats.compressed_tensors import CompressedTensors
from cats.formats.gguf import GGUF
from cats.formats.gptq import GPTQ
from cats.formats.torchao import TorchAO
from cats.protocols import CausalModel
from cats.weights import QuantisedEmbedding, QuantisedLinear
from cats.weights.quantised import PLAIN

_METHOD = "cats"
FORMATS: dict[str, Any] = {
    "compressed-tensors": CompressedTensors,
    "awq": AWQ,
    "gptq": GPTQ,
    "torchao": TorchAO,
}
_FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_DTYPES = {
    **_FLOAT_DTYPES,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip


def stored_format(config: Mapping[str, Any] | None) -> Format | None:
    """The format of a ``quantization_config``; None where transformers is to read it."""
    found = format_or_reason(config)
    return found if isinstance(found, Format) else None


def format_or_reason(config: Mapping[str, Any] | None) -> Format | str:
    """The format of a ``quantization_config``, or what it is that is not read here."""
    if not isinstance(config, Mapping):
        return "no quantization_config"
    name = str(config.get("quant_method", "an unknown method"))
    if name not in FORMATS:
        return name
    try:
        format_: Format = FORMATS[name](config)
        return format_
    except (ValueError, TypeError, AttributeError) as error:
        return f"{name} with {error}"


def load(folder: str, hub_options: Mapping[str, Any], **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """``AutoModelForCausalLM.from_pretrained(..., output_loading_info=True)``, which keeps codes.

    Args:
        folder: Folder or Hugging Face id.
        hub_options: Those of ``kwargs`` that say where files come from.
        **kwargs: As for ``from_pretrained``; ``gguf_file`` names a file of the folder.

    Raises:
        FormatError: If tensors of a quantised layer are missing or do not fit.
        UnsupportedModelError: If layers are quantised that are not linear, or would be offloaded.
    """
    auto: Any = AutoModelForCausalLM
    has_own_config = "config" in kwargs or "quantization_config" in kwargs
    if kwargs.get("gguf_file") is not None:
        found = None if has_own_config else _load_gguf(folder, dict(kwargs))
        if found is not None:
            return found
        reason: Format | str = "GGUF"
    else:
        config = AutoConfig.from_pretrained(folder, **hub_options)
        stored = getattr(config, "quantization_config", None)
        reason = format_or_reason(stored)
        if isinstance(reason, Format) and not has_own_config:
            config.quantization_config = {"quant_method": _METHOD, "stored": stored}
            kwargs = {"config": config, **_without_settings(config, kwargs)}
    try:
        model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    except ImportError as error:
        # transformers asks for the library of a format only where it is stored in that format
        said = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"{folder}: its weights are stored as {reason}, which cats does not read, and "
            f"transformers says: {said}; or convert the 16-bit model to compressed-tensors with "
            "llm-compressor"
        ) from error
    return model, info


def _without_settings(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options of loading; those that change the configuration are put there."""
    rest = {}
    for name, value in kwargs.items():
        if hasattr(config, name) and name not in ("dtype", "torch_dtype", "attn_implementation"):
            setattr(config, name, value)
        else:
            rest[name] = value
    return rest


def _load_gguf(folder: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The model of a GGUF file; None where transformers is to read it."""
    name = kwargs.pop("gguf_file")
    path = Path(folder) / str(kwargs.get("subfolder") or "") / name
    if not path.is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=name)
    except gguf.DAMAGED as error:
        raise FormatError(f"{path}: not a whole GGUF file ({error})") from error
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        skeleton = auto.from_config(config)
    tensors = gguf.read_file(path, skeleton, config)
    if tensors is None or not any(key.rpartition(".")[2].startswith("gguf_") for key in tensors):
        return None
    settings = {"quant_method": _METHOD, "header": _headers(tensors)}
    embedding = _name_of_embedding(skeleton)
    if config.tie_word_embeddings and f"{embedding}.weight" not in tensors:
        # transformers would look for a parameter of the embedding
        config.tie_word_embeddings = False
        settings["tied_embedding"] = embedding
    config.quantization_config = settings
    kwargs = _without_settings(config, kwargs)
    kind: Any = type(skeleton)
    model, info = kind.from_pretrained(
        None, config=config, state_dict=tensors, output_loading_info=True, **kwargs
    )
    # a saved configuration would ask for what only the file has
    del model.config.quantization_config
    return model, info


def _name_of_embedding(model: CausalModel) -> str:
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def _headers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


@register_quantization_config(_METHOD)
class StoredConfig(QuantizationConfigMixin):
    """A ``quantization_config`` that is written back as it was read."""

    def __init__(
        self,
        stored: dict[str, Any] | None = None,
        header: dict[str, Tensor] | None = None,
        tied_embedding: str | None = None,
        **_: Any,
    ) -> None:
        """
        Args:
            stored: What ``config.json`` holds.
            header: Name, shape and dtype of the tensors, where they come from no safetensors file.
            tied_embedding: Name of the embedding whose table is the codes of the head.
        """
        self.quant_method: Any = _METHOD
        self.stored = stored
        self.header = header
        self.tied_embedding = tied_embedding

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stored or {})

    # configurations are asked for fields as dictionaries are
    def get(self, name: str, default: Any = None) -> Any:
        return _METHOD if name == "quant_method" else default


@register_quantizer(_METHOD)
class StoredQuantizer(HfQuantizer):
    """Puts the layers of a checkpoint in place before it is read, and makes them ours after it."""

    requires_calibration = True

    quantization_config: StoredConfig

    def __init__(self, quantization_config: StoredConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        stored = stored_format(quantization_config.stored)
        self.format: Format = GGUF() if stored is None else stored
        # name of a layer to the tensors it was made of: small ones whole, the others on meta
        self.like: dict[str, dict[str, Tensor]] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if len({*map(str, places)}) > 1 and {"cpu", "disk"} & {*map(str, places)}:
            raise UnsupportedModelError(
                "quantised weights are not offloaded: load the whole model on one kind of device"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        header = self.quantization_config.header
        if header is None:
            header = header_of(checkpoint_files or (), self.format)
        self.quantization_config.header = None
        modules = dict(model.named_modules())
        for name, tensors in layers_of(header, self.format).items():
            linear = modules.get(name)
            # of the formats that are read here, GGUF alone has embeddings in codes
            is_table = type(linear) is nn.Embedding and isinstance(self.format, GGUF)
            if type(linear) is not nn.Linear and not is_table:
                kind = "no module of the model" if linear is None else f"a {type(linear).__name__}"
                raise UnsupportedModelError(
                    f"{name} is quantised with {self.format.name}, but it is {kind}, not an "
                    "nn.Linear: load the checkpoint with transformers"
                )
            assert isinstance(linear, nn.Linear | nn.Embedding)
            dtype = linear.weight.dtype
            stored = StoredLayer(tensors, linear, name)
            self.format.read(stored.layer(dtype, tensors)).check(name)
            model.set_submodule(name, stored)
        if self.quantization_config.tied_embedding is not None:
            # nothing is read for it
            model.set_submodule(self.quantization_config.tied_embedding, nn.Module())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in list(model.named_modules()):
            if not isinstance(module, StoredLayer):
                continue
            tensors = {part: getattr(module, part).detach() for part in module.parts}
            if any(tensor.is_meta for tensor in tensors.values()):
                raise FormatError(f"{name}: its tensors were not read")
            weight = self.format.read(module.layer(module.dtype, tensors))
            layer = QuantisedLinear(weight, module.bias, name=name)
            if hasattr(module, "_hf_hook"):
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(layer, module._hf_hook)
            in_place = QuantisedEmbedding(layer) if module.is_table else layer
            model.set_submodule(name, in_place.train(module.training))
            self.like[name] = {
                part: tensor if part in self.format.kept else tensor.to("meta")
                for part, tensor in tensors.items()
            }
        if (name := self.quantization_config.tied_embedding) is not None:
            head = model.get_output_embeddings()
            model.set_submodule(name, QuantisedEmbedding(head).train(head.training))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        state = model.state_dict()
        modules = dict(model.named_modules())
        for name, like in self.like.items():
            layer = modules.get(name)
            if type(layer) is not QuantisedLinear:
                kind = "gone" if layer is None else f"a {type(layer).__name__}"
                raise UnsupportedModelError(
                    f"the layer {name} was quantised and is {kind} now: the {self.format.name} "
                    "checkpoint cannot be written (remove or save adapters first)"
                )
            for part in PLAIN:
                state.pop(f"{name}.{part}", None)
            for part, tensor in self.format.write(name, layer.matrix, like).items():
                state[f"{name}.{part}"] = tensor
        return state, self.format.metadata(state)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class StoredLayer(nn.Module):
    """A linear layer or an embedding while it is read: the checkpoint's tensors, and the bias."""

    def __init__(
        self, tensors: Mapping[str, Tensor], linear: nn.Linear | nn.Embedding, name: str
    ) -> None:
        super().__init__()
        self.is_table = isinstance(linear, nn.Embedding)
        self.parts = tuple(tensors)
        self.name, self.dtype = name, linear.weight.dtype
        self.out_features, self.in_features = linear.weight.shape
        for part, tensor in tensors.items():
            parameter = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
            self.register_parameter(part, parameter)
        self.bias = getattr(linear, "bias", None)

    def layer(self, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> Layer:
        return Layer(
            name=self.name,
            rows=self.out_features,
            columns=self.in_features,
            dtype=dtype,
            tensors=tensors,
        )


def header_of(files: Sequence[str], format_: Format) -> dict[str, Tensor]:
    """Name, shape and dtype of all tensors of a checkpoint, as tensors on ``meta``."""
    found: dict[str, Tensor] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise UnsupportedModelError(
                f"{path}: quantised checkpoints are read from safetensors only; load it with "
                "transformers and save it again"
            )
        try:
            with safetensors.safe_open(path, "pt") as file:
                format_.read_metadata(file.metadata() or {})
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    if dtype is not None:
                        found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        except safetensors.SafetensorError as error:
            raise FormatError(f"{path}: not a whole safetensors file ({error})") from error
    return found


def layers_of(header: Mapping[str, Tensor], format_: Format) -> dict[str, dict[str, Tensor]]:
    """The quantised layers of a checkpoint: name to its tensors."""
    markers = format_.markers()
    names = {name.rpartition(".")[0] for name in header if name.rpartition(".")[2] in markers}
    layers: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(names)}
    for name, tensor in header.items():
        layer, _, part = name.rpartition(".")
        if layer in layers and part in format_.parts:
            layers[layer][part] = tensor
    # a part of a quantised layer without the tensor that tells it
    lone = [n for n in _telling(header, format_) if n.rpartition(".")[0] not in layers]
    if lone:
        raise FormatError(f"{lone[0]} is stored without its {', '.join(sorted(markers))}")
    return layers


def _telling(header: Mapping[str, Tensor], format_: Format) -> Iterator[str]:
    """Tensors whose names no ordinary layer has."""
    parts = format_.parts - {"weight", "scales"} - format_.kept
    return (name for name in header if name.rpartition(".")[2] in parts)
