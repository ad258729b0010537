"""From texts and prompt/answer pairs to rows of token ids and labels."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from cats.data import cut_blocks, text_start, token_blocks
from cats.errors import DataError

# input_ids and labels, both [T], int64. A label of -100 is not learnt.
Row: TypeAlias = dict[str, Tensor]
IGNORED = -100


class Blocks(Dataset[Row]):
    """Texts packed into blocks of equal length; every token is learnt.

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
        tokenizer: Any,
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
    """Blocks of a stream of texts that is read while training, in its order.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: Opens the stream; called once per pass. A resumed run skips what it has seen.
        length: Tokens per block.
        bos: How each block begins; see :func:`cats.data.text_start`.

    Attributes:
        start: Ids with which each block begins.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Callable[[], Iterable[str]],
        *,
        length: int = 1024,
        bos: bool | None = None,
    ) -> None:
        self._tokenizer, self._texts, self.length = tokenizer, texts, length
        self.start = text_start(tokenizer, bos)

    def __iter__(self) -> Iterator[Row]:
        for ids in cut_blocks(self._pieces(), length=self.length, start=self.start):
            block = torch.tensor(ids)
            yield {"input_ids": block, "labels": block}

    def _pieces(self) -> Iterator[list[int]]:
        end = self._tokenizer.eos_token_id
        for text in self._texts():
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            yield ids if end is None else [*ids, end]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFormat:
    """How a row of a data set becomes a prompt and an answer.

    Attributes:
        prompt: Text with names of columns in braces, such as ``"{passage}\\n{question}?"``.
        answer: The same for the answer.
        labels: If the answer is one column of numbers or truth values: their names in order,
            such as ``("no", "yes")``.
    """

    prompt: str = "{question}"
    answer: str = "{answer}"
    labels: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that a row must have."""
        try:
            parts = [*string.Formatter().parse(self.prompt), *string.Formatter().parse(self.answer)]
        except ValueError as error:
            raise DataError(f"{self.prompt!r}, {self.answer!r}: {error}") from error
        if any(name == "" for _, name, _, _ in parts):
            raise DataError(f"{self.prompt!r}, {self.answer!r}: name the column inside of {{}}")
        return list(dict.fromkeys(name for _, name, _, _ in parts if name))

    def apply(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Prompt and answer of one row.

        Raises:
            DataError: If a column is missing or does not have the expected form.
        """
        values = dict(row)
        if self.labels:
            name = self._numbered()
            try:
                label = int(values[name])
            except (LookupError, TypeError, ValueError) as error:
                raise DataError(
                    f"labels name numbers, but {name} is {values.get(name)!r}"
                ) from error
            if not 0 <= label < len(self.labels):
                raise DataError(f"{name} is {label}, but there are {len(self.labels)} labels")
            values[name] = self.labels[label]
        try:
            return self.prompt.format(**values), self.answer.format(**values)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.prompt!r}, {self.answer!r}: does not fit a row with {[*row]}: {error}"
            ) from error

    def _numbered(self) -> str:
        """The one column of the answer, which labels name."""
        names = {name for _, name, _, _ in string.Formatter().parse(self.answer) if name}
        if len(names) != 1:
            raise DataError(f"labels name the numbers of one column, but it is {self.answer!r}")
        return names.pop()


@dataclass(frozen=True, slots=True)
class Pairs(Dataset[Row]):
    """Prompts and answers; only the answer is learnt.

    Attributes:
        prompts: Token ids of each prompt, with the chat template where the tokenizer has one.
        answers: Token ids of each answer and its end.
        references: Text of each answer.
        start: Ids of the special tokens with which all prompts begin, such as a
            beginning-of-sequence token.
    """

    prompts: list[list[int]] = field(repr=False)
    answers: list[list[int]] = field(repr=False)
    references: list[str] = field(repr=False)
    start: list[int] = field(default_factory=list)

    @classmethod
    def of_texts(
        cls,
        tokenizer: Any,
        pairs: Sequence[tuple[str, str]],
        *,
        length: int = 1024,
        bos: bool | None = None,
    ) -> Pairs:
        """Tokenise prompts and answers as a served model sees them.

        The ids of a prompt are those that ``tokenizer(prompt + "\\n")`` or ``apply_chat_template``
        gives, so that they are the same in training and in use. The ids of its answer are what
        follows them when prompt and answer are tokenised as one text. Where the answer would
        change the prompt's last tokens (one token may span both), the prompt keeps its own, and
        the answer is tokenised after some other text.

        Args:
            tokenizer: A Hugging Face tokenizer.
            pairs: Prompts and answers.
            length: Largest number of tokens of a prompt with its answer.
            bos: None: a prompt begins as the tokenizer begins a text, or as the chat template
                says. True: with a beginning-of-sequence token. False: without what the tokenizer
                puts before a text. Both hold for chat templates too. A prompt never begins with two
                such tokens.

        Raises:
            DataError: If there are no pairs, or one is empty, longer than ``length``, or cannot be
                told apart into the tokens of its prompt and of its answer.
        """
        if not pairs:
            raise DataError("no pairs of prompt and answer")
        chat, end = tokenizer.chat_template is not None, tokenizer.eos_token_id
        start = text_start(tokenizer, bos)
        prompts, answers = [], []
        for number, (prompt, answer) in enumerate(pairs, start=1):
            if not prompt.strip() or not answer.strip():
                raise DataError(f"pair {number}: its prompt or answer is empty")
            before, after = _render(tokenizer, prompt, answer) if chat else (f"{prompt}\n", answer)
            try:
                prompt_ids, answer_ids = _tokenise(tokenizer, before, after)
            except DataError as error:
                raise DataError(f"pair {number}: {error}") from error
            if not chat or bos:
                prompt_ids = start + prompt_ids[_starts(prompt_ids, start) :]
            elif bos is False:
                prompt_ids = prompt_ids[_starts(prompt_ids, text_start(tokenizer)) :]
            prompts.append(prompt_ids)
            answers.append(answer_ids if chat or end is None else [*answer_ids, end])
        sizes = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
        if long := sum(size > length for size in sizes):
            first = next(i for i, size in enumerate(sizes, start=1) if size > length)
            raise DataError(
                f"{long} of {len(pairs)} pairs are longer than {length} tokens, such as pair "
                f"{first} with {sizes[first - 1]}: raise the length, or leave them out"
            )
        # a chat template may begin without it
        start = start if all(_starts(p, start) for p in prompts) else []
        return cls(prompts, answers, [answer for _, answer in pairs], start)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Row:
        prompt, answer = self.prompts[index], self.answers[index]
        labels = [IGNORED] * len(prompt) + answer
        return {"input_ids": torch.tensor(prompt + answer), "labels": torch.tensor(labels)}


Examples: TypeAlias = Blocks | StreamedBlocks | Pairs


def _render(tokenizer: Any, prompt: str, answer: str) -> tuple[str, str]:
    """The chat template's text before the answer, and the answer with what ends it."""
    user = [{"role": "user", "content": prompt}]
    whole = [*user, {"role": "assistant", "content": answer}]
    before = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    if not text.startswith(before):
        raise DataError(
            "the chat template changes the prompt once there is an answer, so that the answer "
            "alone cannot be learnt: use a tokenizer with another template, or none"
        )
    return before, text[len(before) :]


def _tokenise(tokenizer: Any, before: str, after: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt on its own, and of the answer that follows it; no special tokens are added.

    Raises:
        DataError: If the answer has no tokens, or its tokens cannot be told from the prompt's.
    """

    def encode(text: str, **kwargs: Any) -> Any:
        return tokenizer(text, add_special_tokens=False, verbose=False, **kwargs)

    def decode(ids: list[int]) -> Any:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    prompt, whole = encode(before)["input_ids"], encode(before + after)["input_ids"]
    if whole == prompt:
        raise DataError("its answer has no tokens")
    if whole[: len(prompt)] == prompt:
        return prompt, whole[len(prompt) :]
    # only fast tokenizers know which part of the text a token comes from
    if getattr(tokenizer, "is_fast", False):
        text = decode(whole)
        # if a token spans both: after another text that shares no token with the answer
        for other in (before, "\n", ".", "a"):
            found = encode(other + after, return_offsets_mapping=True)
            ends = [end for _, end in found["offset_mapping"]]
            first = sum(end <= len(other) for end in ends)
            answer = found["input_ids"][first:]
            if answer and decode(prompt + answer) == text:
                return prompt, answer
    raise DataError(
        "the answer changes the last tokens of its prompt, and what is left for the answer cannot "
        "be told: end the prompt or begin the answer otherwise, or use a fast tokenizer"
    )


def _starts(ids: list[int], start: list[int]) -> int:
    """Number of tokens in ``start`` where the ids begin with it, else 0."""
    return len(start) if ids[: len(start)] == start else 0


def pack(pairs: Pairs, *, length: int) -> Tensor:
    """The tokens of prompts and answers, one after the other, in blocks ``[N, length]``.

    Every block begins as all prompts begin.

    Raises:
        DataError: If they fill no block.
    """
    rows = [p + a for p, a in zip(pairs.prompts, pairs.answers, strict=True)]
    blocks = list(cut_blocks(rows, length=length, start=pairs.start))
    if not blocks:
        raise DataError(f"{sum(map(len, rows))} tokens fill no block of {length}")
    return torch.tensor(blocks)


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


def describe(examples: Examples) -> dict[str, Any]:
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
