"""What cats uses of the models and tokenizers of other libraries, as types.

They say what is expected of an argument; nothing is checked when a program runs. Models stay
``nn.Module`` where only modules and tensors are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class ModelConfig(Protocol):
    """The configuration of a Hugging Face model. What only some families have is read by getattr.

    ``cats`` is what :func:`cats.sparsify_` records; a dense model does not have it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    name_or_path: str
    cats: dict[str, Any]

    def get_text_config(self, *, decoder: bool = ...) -> ModelConfig:
        """The part that describes the language model; the configuration itself where it is all."""

    def to_dict(self) -> dict[str, Any]: ...


class CausalOutput(Protocol):
    """What a forward pass gives: ``logits`` is ``[B, T, V]``."""

    logits: Tensor
    loss: Tensor | None


class CausalModel(Protocol):
    """A Hugging Face causal language model, or a wrapper with the same interface (PEFT)."""

    config: ModelConfig
    generation_config: Any
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *args: Any, **kwargs: Any) -> CausalOutput: ...

    def generate(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def get_input_embeddings(self) -> nn.Module: ...

    def get_output_embeddings(self) -> nn.Module | None: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]: ...

    def train(self, mode: bool = ...) -> nn.Module: ...

    def eval(self) -> nn.Module: ...

    def save_pretrained(self, save_directory: str) -> Any: ...


class Tokenizer(Protocol):
    """A Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: object
    is_fast: bool

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def special_tokens_map(self) -> dict[str, Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> str: ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...

    def clean_up_tokenization(self, text: str) -> str: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def save_pretrained(self, save_directory: str) -> Any: ...
