"""Fine-tuning of sparse models: LoRA through PEFT, trained by transformers' Trainer."""

from typing import TYPE_CHECKING

from cats.lazy import exports

if TYPE_CHECKING:
    from cats.finetuning.adapters import load_adapter
    from cats.finetuning.blocks import Blocks, StreamedBlocks
    from cats.finetuning.options import FinetuneOptions
    from cats.finetuning.pairs import PairFormat, Pairs
    from cats.finetuning.run import Finetuned, finetune

__all__ = [
    "Blocks",
    "FinetuneOptions",
    "Finetuned",
    "PairFormat",
    "Pairs",
    "StreamedBlocks",
    "finetune",
    "load_adapter",
]

# on first use: the command line reads FinetuneOptions and must not wait for torch
__getattr__, __dir__ = exports(
    __name__,
    {
        "Blocks": "cats.finetuning.blocks",
        "FinetuneOptions": "cats.finetuning.options",
        "Finetuned": "cats.finetuning.run",
        "PairFormat": "cats.finetuning.pairs",
        "Pairs": "cats.finetuning.pairs",
        "StreamedBlocks": "cats.finetuning.blocks",
        "finetune": "cats.finetuning.run",
        "load_adapter": "cats.finetuning.adapters",
    },
)
