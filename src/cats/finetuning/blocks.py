"""Blocks of equal length, from texts in memory or from a stream of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from cats.data import cut_blocks, text_start, token_blocks
from cats.errors import DataError
from cats.protocols import Tokenizer

# input_ids and labels, both [T], int64. The loss leaves out labels of IGNORED.
Row: TypeAlias = dict[str, Tensor]
IGNORED = -100


class Blocks(Dataset[Row]):
    """Texts packed into blocks of equal length; the loss covers every token.

    Attributes:
        ids: ``[N, T]``, int64.

    Raises:
        DataError: If the ids have another shape or dtype.
    """

    def __init__(self, ids: Tensor) -> None:
        if ids.ndim != 2 or not len(ids) or ids.shape[1] < 2 or ids.dtype != torch.int64:
            raise DataError(
                f"expected blocks [N, T] of at least two tokens, int64; got {[*ids.shape]} in "
                f"{str(ids.dtype).removeprefix('torch.')}"
            )
        self.ids = ids

    @classmethod
    def of_texts(
        cls,
        tokenizer: Tokenizer,
        texts: Iterable[str],
        *,
        length: int = 1024,
        limit: int | None = None,
        bos: bool | None = None,
    ) -> Blocks:
        """Pack texts; see :func:`cats.data.token_blocks`."""
        return cls(token_blocks(tokenizer, texts, length=length, limit=limit, bos=bos))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class StreamedBlocks(IterableDataset[Row]):
    """Blocks of a stream of texts, which is read in its order during the training.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: Opens the stream; called once per pass. A resumed run skips the blocks that it has
            trained on.
        length: Tokens per block.
        bos: How each block begins; see :func:`cats.data.text_start`.

    Attributes:
        start: Ids with which each block begins.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: Callable[[], Iterable[str]],
        *,
        length: int = 1024,
        bos: bool | None = None,
    ) -> None:
        self._tokenizer, self._texts, self.length = tokenizer, texts, length
        self.start = text_start(tokenizer, bos)

    def __iter__(self) -> Iterator[Row]:
        for ids in cut_blocks(self._token_ids(), length=self.length, start=self.start):
            block = torch.tensor(ids)
            yield {"input_ids": block, "labels": block}

    def _token_ids(self) -> Iterator[list[int]]:
        end = self._tokenizer.eos_token_id
        for text in self._texts():
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            yield ids if end is None else [*ids, end]
