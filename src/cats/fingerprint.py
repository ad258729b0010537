"""Short hashes of what results depend on: weights, thresholds, tokenizer, data.

Results that are stored for later use are stored with these hashes, not only with names. So a result
of another model, other thresholds or other data is never mistaken for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cats.config import CatsConfig
from cats.errors import StorageError
from cats.protocols import Tokenizer
from cats.weights import INPUT_THRESHOLD, plain_tensors

_DIGITS = 16
# Elements of each weight that are hashed one by one; its checksum covers all of them.
_SAMPLES = 64
_THRESHOLDS = (".threshold", f".{INPUT_THRESHOLD}")


def of_model(model: nn.Module) -> str:
    """Hash of the weights of a model: the same on every device, dense or sparse.

    Of every weight it covers name, shape, dtype, some elements, and a checksum of all elements.
    Thresholds are left out. It takes about as long as reading the weights once.

    Weights on the ``meta`` device have no values: only name, shape and dtype count.
    """
    values: list[Tensor] = []
    descriptions: list[list[object]] = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or name.endswith(_THRESHOLDS):
            continue
        for plain in plain_tensors(tensor.detach()):
            descriptions.append([name, list(plain.shape), str(plain.dtype), plain.is_meta])
            if plain.numel() and not plain.is_meta:
                values += [value.cpu() for value in _sample_and_checksum(plain)]
    digest = hashlib.sha256(json.dumps(descriptions).encode())
    for value in values:
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def of_thresholds(config: CatsConfig) -> str:
    """Hash of a config's method, router and tensors."""
    digest = hashlib.sha256(json.dumps([config.method, config.router]).encode())
    masks = {layer: {INPUT_THRESHOLD: tensor} for layer, tensor in config.inputs.items()}
    for owner, tensors in sorted((config.tensors | masks).items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(json.dumps([owner, name, list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def of_tokenizer(tokenizer: Tokenizer) -> str:
    """Hash of a Hugging Face tokenizer: how it splits, its special tokens, its chat template."""
    rules: object
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        content = json.loads(backend.to_str())
        # these two change with every call that pads or cuts
        rules = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
    else:
        rules = sorted(tokenizer.get_vocab().items())
    # padding is masked, and lm-evaluation-harness sets the token while it runs
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    adds = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    template = getattr(tokenizer, "chat_template", None)
    return of_value([type(tokenizer).__name__, rules, special, adds, template])


def of_files(files: Mapping[str, str | Path]) -> str:
    """Hash of the contents of files and of the keys.

    Args:
        files: A name that does not depend on the machine, to the path.

    Raises:
        StorageError: If a file cannot be read.
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


def of_value(value: object) -> str:
    """Hash of a value that JSON can write; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _sample_and_checksum(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of some elements, and one integer over all; large weights are not copied."""
    if tensor.device.type not in ("cpu", "cuda"):
        tensor = tensor.cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    count = min(_SAMPLES, tensor.numel())
    # evenly from the first to the last; integers, so that every device picks the same
    picks = torch.arange(count, device=tensor.device) * (tensor.numel() - 1) // max(1, count - 1)
    sample = tensor[torch.unravel_index(picks, tensor.shape)] if tensor.ndim else tensor.reshape(1)
    if tensor.dtype.itemsize == 1:
        tensor = tensor.view(torch.uint8)
    # an exclusive or over the bits: exact in any order
    checksum = torch.hash_tensor(tensor).view(torch.int64).reshape(1)
    return sample.contiguous().view(torch.uint8), checksum
