"""Fine-tuning of sparse models: LoRA through PEFT, trained by transformers' Trainer."""

from cats.finetuning.adapters import load_adapter
from cats.finetuning.data import Blocks, PairFormat, Pairs, StreamedBlocks
from cats.finetuning.options import FinetuneOptions
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
