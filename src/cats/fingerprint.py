"""Short hashes of what results depend on: weights, thresholds, tokenizer, data.

What is kept and used again is kept with these, so that nothing of another model, other thresholds
or other data is taken for it, whatever they are called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cats.config import CatsConfig
from cats.errors import StorageError
from cats.weights import plain_tensors

_DIGITS = 16
# Elements of each weight that are hashed one by one; all of them are in its checksum.
_SAMPLES = 64
_THRESHOLD = ".threshold"


def of_model(model: nn.Module) -> str:
    """Hash of the weights of a model: the same on every device, dense or sparse.

    Every weight is in it: name, shape, dtype, some elements, and a checksum of all elements.
    Thresholds are left out. It takes about as long as reading the weights once.

    Weights on the ``meta`` device have no values: of them only name, shape and dtype count.
    """
    parts: list[Tensor] = []
    names: list[Any] = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or name.endswith(_THRESHOLD):
            continue
        for plain in plain_tensors(tensor.detach()):
            names.append([name, list(plain.shape), str(plain.dtype), plain.is_meta])
            if plain.numel() and not plain.is_meta:
                parts += [part.cpu() for part in _numbers(plain)]
    digest = hashlib.sha256(json.dumps(names).encode())
    for part in parts:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def of_thresholds(config: CatsConfig) -> str:
    """Hash of all that a config does to a model: method, router, and every tensor."""
    digest = hashlib.sha256(json.dumps([config.method, config.router]).encode())
    for mlp, tensors in sorted(config.tensors.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(json.dumps([mlp, name, list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def of_tokenizer(tokenizer: Any) -> str:
    """Hash of a Hugging Face tokenizer: how it splits, its special tokens, its chat template."""
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(fast, "to_str"):
        rules = json.loads(fast.to_str())
        # these change with every call that pads or cuts
        rules = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    else:
        rules = sorted(tokenizer.get_vocab().items())
    # padding is masked, and the harness chooses its token while it asks
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    adds = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    template = getattr(tokenizer, "chat_template", None)
    return of_value([type(tokenizer).__name__, rules, special, adds, template])


def of_files(files: Mapping[str, str | Path]) -> str:
    """Hash of the contents of files and of the names that they are given here.

    Raises:
        StorageError: If one cannot be read.
    """
    digests = {}
    for name, path in files.items():
        try:
            with Path(path).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    return of_value(digests)


def of_tokens(ids: Tensor) -> str:
    """Hash of token ids of any shape, in their order."""
    data = ids.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(json.dumps(list(ids.shape)).encode() + data).hexdigest()[:_DIGITS]


def of_value(value: Any) -> str:
    """Hash of what JSON can write; the order of keys is free."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _numbers(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Some elements, bit for bit, and one integer over all of them; no copy of a large weight."""
    if tensor.device.type not in ("cpu", "cuda"):
        tensor = tensor.cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    count = min(_SAMPLES, tensor.numel())
    # in integers: evenly from the first to the last
    picks = torch.arange(count, device=tensor.device) * (tensor.numel() - 1) // max(1, count - 1)
    where = torch.unravel_index(picks, tensor.shape)
    some = tensor[where] if tensor.ndim else tensor.reshape(1)
    if tensor.dtype.itemsize == 1:
        tensor = tensor.view(torch.uint8)
    # an exclusive or over the bits: exact, whatever the order
    total = torch.hash_tensor(tensor).view(torch.int64).reshape(1)
    return some.contiguous().view(torch.uint8), total
