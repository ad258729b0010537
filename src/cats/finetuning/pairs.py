"""Prompts and answers: their text from a row of a data set, and their token ids."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cats.data import cut_blocks, text_start
from cats.errors import DataError
from cats.finetuning.blocks import IGNORED, Row
from cats.protocols import Tokenizer


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

    def apply(self, row: Mapping[str, object]) -> tuple[str, str]:
        """Prompt and answer of one row.

        Raises:
            DataError: If a column is missing or does not have the expected form.
        """
        values = dict(row)
        if self.labels:
            name = self._answer_column()
            try:
                label = int(values[name])  # type: ignore[call-overload]  # checked by int
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

    def _answer_column(self) -> str:
        names = {name for _, name, _, _ in string.Formatter().parse(self.answer) if name}
        if len(names) != 1:
            raise DataError(f"labels name the numbers of one column, but it is {self.answer!r}")
        return names.pop()


@dataclass(frozen=True, slots=True)
class Pairs(Dataset[Row]):
    """Prompts and answers; the loss covers the tokens of the answers only.

    Attributes:
        prompts: Token ids of each prompt, with the chat template where the tokenizer has one.
        answers: Token ids of each answer, with the token that ends it.
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
        tokenizer: Tokenizer,
        pairs: Sequence[tuple[str, str]],
        *,
        length: int = 1024,
        bos: bool | None = None,
    ) -> Pairs:
        """Tokenise prompts and answers as a served model gets them.

        The ids of a prompt are those of ``tokenizer(prompt + "\\n")`` or ``apply_chat_template``,
        so that they are the same in training and in use. The ids of its answer are those that
        follow when prompt and answer are tokenised as one text. If the answer would change the last
        tokens of the prompt (one token may span both), the prompt keeps its ids, and the answer is
        tokenised after another text.

        Args:
            tokenizer: A Hugging Face tokenizer.
            pairs: Prompts and answers.
            length: Largest number of tokens of a prompt with its answer.
            bos: How a prompt begins. None: as the tokenizer begins a text, or as the chat template
                does. True: with a beginning-of-sequence token. False: without the tokens that the
                tokenizer puts before a text. True and False hold for chat templates too. A prompt
                never begins with two such tokens.

        Raises:
            DataError: If there are no pairs, if one is empty or longer than ``length``, or if its
                tokens cannot be divided into those of the prompt and those of the answer.
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
                prompt_ids = start + _without_start(prompt_ids, start)
            elif bos is False:
                prompt_ids = _without_start(prompt_ids, text_start(tokenizer))
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
        start = start if all(p[: len(start)] == start for p in prompts) else []
        return cls(prompts, answers, [answer for _, answer in pairs], start)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Row:
        prompt, answer = self.prompts[index], self.answers[index]
        labels = [IGNORED] * len(prompt) + answer
        return {"input_ids": torch.tensor(prompt + answer), "labels": torch.tensor(labels)}


def _render(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[str, str]:
    """The text of the chat template before the answer, and the answer with its end."""
    user = [{"role": "user", "content": prompt}]
    conversation = [*user, {"role": "assistant", "content": answer}]
    before = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    if not text.startswith(before):
        raise DataError(
            "the chat template changes the prompt if an answer follows, so that the answer alone "
            "cannot be learnt: use a tokenizer with another template, or none"
        )
    return before, text[len(before) :]


def _tokenise(tokenizer: Tokenizer, before: str, after: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt on its own, and of the answer that follows it; no special tokens are added.

    Raises:
        DataError: If the answer has no tokens, or its tokens cannot be separated from the prompt's.
    """

    def encode(text: str, **kwargs: Any) -> Mapping[str, list[Any]]:
        encoding: Mapping[str, list[Any]] = tokenizer(
            text, add_special_tokens=False, verbose=False, **kwargs
        )
        return encoding

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    prompt, joined = encode(before)["input_ids"], encode(before + after)["input_ids"]
    if joined == prompt:
        raise DataError("its answer has no tokens")
    if joined[: len(prompt)] == prompt:
        return prompt, joined[len(prompt) :]
    # only fast tokenizers say which part of the text a token comes from
    if getattr(tokenizer, "is_fast", False):
        text = decode(joined)
        # if a token spans both: after another text that shares no token with the answer
        for other in (before, "\n", ".", "a"):
            encoding = encode(other + after, return_offsets_mapping=True)
            ends = [end for _, end in encoding["offset_mapping"]]
            first = sum(end <= len(other) for end in ends)
            answer = encoding["input_ids"][first:]
            if answer and decode(prompt + answer) == text:
                return prompt, answer
    raise DataError(
        "the answer changes the last tokens of its prompt, and the tokens of the answer cannot be "
        "told from them: change the end of the prompt or the beginning of the answer, or use a "
        "fast tokenizer"
    )


def _without_start(ids: list[int], start: list[int]) -> list[int]:
    return ids[len(start) :] if ids[: len(start)] == start else ids


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
