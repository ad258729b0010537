"""The data of a fine-tuning, by the names of files: to learn, to measure on, to calibrate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cats.errors import ConfigError
from cats.recipes.tokens import tokens_or_default

if TYPE_CHECKING:
    from torch import Tensor

    from cats.finetuning import Pairs
    from cats.finetuning.data import Blocks, Examples
    from cats.protocols import Tokenizer


@dataclass(kw_only=True)
class TrainingData:
    r"""Names of files and data sets, checked; each method reads what it needs.

    The options of ``cats finetune`` are made of these fields and of the words below.

    Attributes:
        text: Text to learn: .txt, .jsonl (both .gz too), .parquet, a part such as c4.txt.gz[:50%],
            or a Hugging Face id NAME:CONFIG:SPLIT.
        pairs: Prompts and answers to learn: .jsonl, .parquet or an id.
        prompt: Template of a prompt, such as {passage}\n{question}?
        answer: Template of an answer.
        labels: Names of numbered answers, separated by commas, such as no,yes.
        calibration_text: Text for thresholds. Default: the text or pairs to learn.
        calibration_tokens: Largest number of calibration tokens.
        block: Tokens per block, or per pair.
        eval_text: NAME=TEXT, measured while training.
        eval_pairs: NAME=PAIRS, measured while training.
        eval_tokens: Largest number of tokens of each text to measure on.
        seed: Seed of the draw of calibration blocks.
        bos: As for :func:`cats.data.token_blocks`.

    Raises:
        ConfigError: If the fields contradict each other.
    """

    text: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    prompt: str = "{question}"
    answer: str = "{answer}"
    labels: str | None = None
    calibration_text: tuple[str, ...] = ()
    calibration_tokens: int | None = field(default=None, metadata={"least": 1})
    block: int = field(default=1024, metadata={"least": 2})
    eval_text: tuple[str, ...] = ()
    eval_pairs: tuple[str, ...] = ()
    eval_tokens: int | None = field(default=None, metadata={"least": 2})
    seed: int = 0
    bos: bool | None = None

    def __post_init__(self) -> None:
        from cats.finetuning import PairFormat
        from cats.finetuning.sources import REFINEDWEB

        for name in ("text", "pairs", "calibration_text", "eval_text", "eval_pairs"):
            # each letter would be taken for a name
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a list of names, got {getattr(self, name)!r}")
        if self.text and self.pairs:
            raise ConfigError("give --text or --pairs, not both")
        self._sources = self.pairs or self.text or (REFINEDWEB,)
        self._pair_format = PairFormat(
            prompt=self.prompt.replace("\\n", "\n"),
            answer=self.answer.replace("\\n", "\n"),
            labels=tuple(self.labels.split(",")) if self.labels else (),
        )
        if self._pair_format != PairFormat() and not (self.pairs or self.eval_pairs):
            raise ConfigError("--prompt, --answer and --labels are for --pairs and --eval-pairs")
        self._eval_text, self._eval_pairs = _by_name(self.eval_text), _by_name(self.eval_pairs)
        if common := self._eval_text.keys() & self._eval_pairs.keys():
            raise ConfigError(f"two evaluations are called {', '.join(common)}")
        self._eval_blocks = self._blocks(
            self.eval_tokens if self.eval_text else None, "--eval-tokens"
        )
        self._calibration_blocks = self._blocks(self.calibration_tokens, "--calibration-tokens")

    def about(self) -> dict[str, object]:
        """Names of the data, for the history."""
        from cats.finetuning.sources import Source

        return {"data": [str(Source.parse(name)) for name in self._sources], "block": self.block}

    def train(self, tokenizer: Tokenizer) -> Examples:
        """Examples to learn; data sets of text are streamed."""
        from cats.finetuning import Blocks, StreamedBlocks
        from cats.finetuning.sources import Source

        if self.pairs:
            return self._read_pairs(tokenizer, self.pairs)
        if all(Source.parse(name).is_file for name in self._sources):
            texts = _texts(self._sources)
            return Blocks.of_texts(tokenizer, texts, length=self.block, bos=self.bos)
        return StreamedBlocks(
            tokenizer, lambda: _texts(self._sources), length=self.block, bos=self.bos
        )

    def evaluations(self, tokenizer: Tokenizer) -> dict[str, Blocks | Pairs]:
        """Held-out examples by name."""
        from cats.finetuning import Blocks

        examples: dict[str, Blocks | Pairs] = {}
        for name, text in self._eval_text.items():
            examples[name] = Blocks.of_texts(
                tokenizer, _texts([text]), length=self.block, limit=self._eval_blocks, bos=self.bos
            )
        for name, pairs in self._eval_pairs.items():
            examples[name] = self._read_pairs(tokenizer, [pairs])
        return examples

    def calibration(self, tokenizer: Tokenizer, train: Examples) -> Tensor:
        """Token ids ``[N, T]`` for thresholds, of ``calibration_text`` or drawn from ``train``."""
        import torch

        from cats.finetuning import Blocks, Pairs
        from cats.finetuning.data import pack

        limit = self._calibration_blocks
        if self.calibration_text or not isinstance(train, Blocks | Pairs):
            texts = _texts(self.calibration_text or self._sources)
            return Blocks.of_texts(
                tokenizer, texts, length=self.block, limit=limit, bos=self.bos
            ).ids
        blocks = train.ids if isinstance(train, Blocks) else pack(train, length=self.block)
        generator = torch.Generator().manual_seed(self.seed)
        return blocks[torch.randperm(len(blocks), generator=generator)[:limit]]

    def _blocks(self, tokens: int | None, option: str) -> int:
        return tokens_or_default(tokens, 100_000, self.block, option) // self.block

    def _read_pairs(self, tokenizer: Tokenizer, names: Sequence[str]) -> Pairs:
        from cats.finetuning import Pairs
        from cats.finetuning.sources import Source, read_rows

        columns = self._pair_format.columns
        rows = [row for name in names for row in read_rows(Source.parse(name), columns)]
        pairs = [self._pair_format.apply(row) for row in rows]
        return Pairs.of_texts(tokenizer, pairs, length=self.block, bos=self.bos)


def _texts(names: Sequence[str]) -> Iterator[str]:
    from cats.finetuning.sources import Source, read_texts

    for name in names:
        yield from read_texts(Source.parse(name))


def _by_name(values: Sequence[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for value in values:
        name, equals, source = value.partition("=")
        if not (name and equals and source) or name in sources:
            raise ConfigError(f"expected NAME=FILE, each name once, got {value!r}")
        sources[name] = source
    return sources
