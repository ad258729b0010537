"""Examples of a fine-tuning, blocks or pairs: batches, sizes and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from cats.finetuning.blocks import IGNORED, Blocks, Row, StreamedBlocks
from cats.finetuning.pairs import PairFormat, Pairs, pack

__all__ = [
    "IGNORED",
    "Blocks",
    "Examples",
    "PairFormat",
    "Pairs",
    "Row",
    "StreamedBlocks",
    "collate",
    "describe",
    "longest",
    "pack",
    "token_range",
]

Examples: TypeAlias = Blocks | StreamedBlocks | Pairs


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """One batch: ``input_ids`` and ``labels``, ``[B, T]``, padded on the right.

    Padding has the id 0, and an ``attention_mask`` hides it. Without padding there is no mask.
    """
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[Tensor], fill: int) -> Tensor:
        return torch.stack([torch.cat([v, v.new_full((length - len(v),), fill)]) for v in values])

    batch = {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }
    if any(len(row["input_ids"]) < length for row in rows):
        ones = [torch.ones_like(row["input_ids"]) for row in rows]
        batch["attention_mask"] = padded(ones, 0)
    return batch


def describe(examples: Examples) -> dict[str, object]:
    """Kind, size and hash of examples; for a stream its kind, and how it is cut into blocks."""
    if isinstance(examples, StreamedBlocks):
        return {"kind": "stream", "length": examples.length, "start": examples.start}
    digest = hashlib.sha256()
    tokens = 0
    for i in range(len(examples)):
        row = examples[i]
        tokens += len(row["input_ids"])
        digest.update(torch.cat([row["input_ids"], row["labels"]]).numpy().tobytes())
    kind = "blocks" if isinstance(examples, Blocks) else "pairs"
    return {"kind": kind, "rows": len(examples), "tokens": tokens, "hash": digest.hexdigest()[:16]}


def token_range(examples: Blocks | Pairs) -> tuple[int, int]:
    """The smallest and the largest token id."""
    if isinstance(examples, Blocks):
        return int(examples.ids.min()), int(examples.ids.max())
    rows = [*examples.prompts, *examples.answers]
    return min(min(ids) for ids in rows if ids), max(max(ids) for ids in rows if ids)


def longest(examples: Examples) -> int:
    """Number of tokens of the longest row; for a stream, of each block."""
    if isinstance(examples, StreamedBlocks):
        return examples.length
    if isinstance(examples, Blocks):
        return int(examples.ids.shape[1])
    return max(len(p) + len(a) for p, a in zip(examples.prompts, examples.answers, strict=True))
