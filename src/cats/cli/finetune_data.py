"""What the options of ``cats finetune`` and ``cats bench finetune`` about data come to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cats.cli import options
from cats.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from cats.finetuning import Pairs
    from cats.finetuning.data import Blocks, Examples


@dataclass(kw_only=True)
class Data:
    """The options as they were given, checked; each method reads what it names.

    Raises:
        ConfigError: If they contradict each other.
    """

    text: list[str] | None
    pairs: list[str] | None
    prompt: str
    answer: str
    labels: str | None
    eval_text: list[str] | None
    eval_pairs: list[str] | None
    eval_tokens: int | None
    calibration_text: list[str] | None
    calibration_tokens: int | None
    block: int
    seed: int
    bos: bool | None

    def __post_init__(self) -> None:
        from cats.finetuning import PairFormat
        from cats.finetuning.sources import REFINEDWEB

        if self.text and self.pairs:
            raise ConfigError("give --text or --pairs, not both")
        self._learnt = self.pairs or self.text or [REFINEDWEB]
        self._form = PairFormat(
            prompt=self.prompt.replace("\\n", "\n"),
            answer=self.answer.replace("\\n", "\n"),
            labels=tuple(self.labels.split(",")) if self.labels else (),
        )
        if self._form != PairFormat() and not (self.pairs or self.eval_pairs):
            raise ConfigError("--prompt, --answer and --labels are for --pairs and --eval-pairs")
        self._eval_text, self._eval_pairs = _by_name(self.eval_text), _by_name(self.eval_pairs)
        if both := self._eval_text.keys() & self._eval_pairs.keys():
            raise ConfigError(f"two evaluations are called {', '.join(both)}")
        self._eval_blocks = self._blocks(
            self.eval_tokens if self.eval_text else None, "--eval-tokens"
        )
        self._calibration_blocks = self._blocks(self.calibration_tokens, "--calibration-tokens")

    def about(self) -> dict[str, Any]:
        """Names of the data, for the history."""
        from cats.finetuning.sources import Source

        return {"data": [str(Source.parse(name)) for name in self._learnt], "block": self.block}

    def train(self, tokenizer: Any) -> Examples:
        """What to learn; data sets of text are streamed."""
        from cats.finetuning import Blocks, StreamedBlocks
        from cats.finetuning.sources import Source

        if self.pairs:
            return self._read_pairs(tokenizer, self.pairs)
        if all(Source.parse(name).is_file for name in self._learnt):
            return Blocks.of_texts(tokenizer, _texts(self._learnt), length=self.block, bos=self.bos)
        return StreamedBlocks(
            tokenizer, lambda: _texts(self._learnt), length=self.block, bos=self.bos
        )

    def evaluations(self, tokenizer: Any) -> dict[str, Blocks | Pairs]:
        """Held-out examples by name."""
        from cats.finetuning import Blocks

        found: dict[str, Blocks | Pairs] = {}
        for name, text in self._eval_text.items():
            found[name] = Blocks.of_texts(
                tokenizer, _texts([text]), length=self.block, limit=self._eval_blocks, bos=self.bos
            )
        for name, pairs in self._eval_pairs.items():
            found[name] = self._read_pairs(tokenizer, [pairs])
        return found

    def calibration(self, tokenizer: Any, train: Examples) -> Tensor:
        """Blocks for thresholds, drawn by the seed from what is learnt or from other text."""
        import torch

        from cats.finetuning import Blocks, Pairs
        from cats.finetuning.data import pack

        limit = self._calibration_blocks
        if self.calibration_text or not isinstance(train, Blocks | Pairs):
            texts = _texts(self.calibration_text or self._learnt)
            return Blocks.of_texts(
                tokenizer, texts, length=self.block, limit=limit, bos=self.bos
            ).ids
        blocks = train.ids if isinstance(train, Blocks) else pack(train, length=self.block)
        generator = torch.Generator().manual_seed(self.seed)
        return blocks[torch.randperm(len(blocks), generator=generator)[:limit]]

    def _blocks(self, tokens: int | None, option: str) -> int:
        return options.tokens_or_default(tokens, 100_000, self.block, option) // self.block

    def _read_pairs(self, tokenizer: Any, names: list[str]) -> Pairs:
        from cats.finetuning import Pairs
        from cats.finetuning.sources import Source, read_rows

        rows = [row for name in names for row in read_rows(Source.parse(name), self._form.columns)]
        pairs = [self._form.apply(row) for row in rows]
        return Pairs.of_texts(tokenizer, pairs, length=self.block, bos=self.bos)


def pairs_of(evaluations: dict[str, Blocks | Pairs]) -> dict[str, Pairs]:
    """Those evaluations that have answers."""
    from cats.finetuning import Pairs

    return {name: found for name, found in evaluations.items() if isinstance(found, Pairs)}


def _texts(names: list[str]) -> Iterator[str]:
    from cats.finetuning.sources import Source, read_texts

    for name in names:
        yield from read_texts(Source.parse(name))


def _by_name(values: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values or []:
        name, equals, source = value.partition("=")
        if not (name and equals and source) or name in found:
            raise ConfigError(f"expected NAME=FILE, each name once, got {value!r}")
        found[name] = source
    return found
