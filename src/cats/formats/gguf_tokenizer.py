"""Tokenizers of GGUF files: written for llama.cpp, mended where transformers reads too little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cats.errors import UnsupportedModelError
from cats.formats.gguf import read_header
from cats.protocols import Tokenizer
from cats.smollm2 import split_digits_

# How text is split before merges, by the name that llama.cpp has for it.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}
# Types of tokens in a GGUF file.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def write_tokenizer(writer: Any, tokenizer: Tokenizer, vocabulary: int) -> None:
    """Add a byte-level BPE tokenizer to a ``gguf.GGUFWriter``.

    Args:
        writer: Before its header is written.
        tokenizer: A fast one.
        vocabulary: Rows of the embedding; ids without a token get an unused one.

    Raises:
        UnsupportedModelError: If it is of another kind.
    """
    stored = _description(tokenizer)
    kind = None if stored is None else _kind_of(stored["pre_tokenizer"])
    if stored is None or stored["model"]["type"] != "BPE" or kind is None:
        raise UnsupportedModelError(
            "this tokenizer is not written as GGUF here, expected the byte-level BPE of Llama 3, "
            "Qwen 2, SmolLM or GPT-2: leave it out with --no-tokenizer, or use "
            "convert_hf_to_gguf.py of llama.cpp"
        )
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    for token, index in stored["model"]["vocab"].items():
        tokens[index], types[index] = token, _NORMAL
    for added in stored["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = stored["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for name in ("bos", "eos", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    # whether it begins a text with the beginning-of-sequence token
    starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
    writer.add_add_bos_token(starts)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def has_tokenizer(path: Path) -> bool:
    """Whether a GGUF file holds a tokenizer."""
    kind = read_header(path).settings.get("tokenizer.ggml.model", "none")
    return kind not in ("none", "no_vocab")


def mend_tokenizer_(tokenizer: Any, path: Path) -> None:
    """Split numbers into digits where the file says so: transformers does not read that, in place.

    Args:
        tokenizer: What transformers made of the file.
        path: The GGUF file.
    """
    if read_header(path).settings.get("tokenizer.ggml.pre") == "smollm":
        split_digits_(tokenizer)


def _description(tokenizer: Any) -> dict[str, Any] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())


def _kind_of(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """What llama.cpp calls this way to split text; None where it is none of those known here."""
    steps: list[dict[str, Any]] = []
    if pre_tokenizer is not None:
        steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match [step["type"] for step in steps]:
        case ["ByteLevel"] if steps[0]["use_regex"]:
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        case ["Split", "ByteLevel"] if not steps[1]["use_regex"]:
            return _PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
    return None
