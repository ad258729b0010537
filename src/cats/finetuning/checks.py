"""Checks before the first step: what would fail hours later fails at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from cats.errors import ConfigError, DataError, UnsupportedModelError
from cats.finetuning import adapters
from cats.finetuning.data import Blocks, Examples, Pairs, StreamedBlocks, longest, token_range
from cats.finetuning.options import FinetuneOptions
from cats.finetuning.processes import is_under_fsdp, world_size
from cats.model import is_sparse
from cats.protocols import CausalModel
from cats.weights import InputMask, is_quantised


def check_run(
    model: nn.Module,
    train: Examples,
    options: FinetuneOptions,
    *,
    evaluations: Mapping[str, Blocks | Pairs],
    answers: Mapping[str, Pairs],
    calibration: Tensor | None,
    merge: bool,
) -> None:
    """Raise an error if model, options and data do not fit together.

    The arguments are those of :func:`cats.finetuning.finetune`, which lists the errors.
    """
    _check_model(model, options, merge)
    _check_reporting(options)
    _check_sparsity(model, options, calibration)
    if is_under_fsdp() and (answers or merge or options.recalibrate):
        raise ConfigError(
            "answers, merging and recalibration need whole weights, which FSDP cuts into pieces: "
            "do these in one process when the training is done"
        )
    _check_kinds({"training": train, **evaluations, **answers})
    rows_per_step = options.batch_size * options.accumulate * world_size()
    if not isinstance(train, StreamedBlocks) and len(train) < rows_per_step:
        raise DataError(
            f"{len(train)} rows fill no step of {rows_per_step}: give more text, shorter blocks, "
            "or a smaller batch"
        )
    for name, examples in {"training": train, **evaluations}.items():
        _check_tokens(model, name, examples)


def _check_model(model: nn.Module, options: FinetuneOptions, merge: bool) -> None:
    if not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"expected a language model of transformers, got {type(model).__name__}"
        )
    adapters.refuse_fused(model)
    if merge and options.full:
        raise ConfigError("full fine-tuning has no adapters to merge: it writes model/")
    if is_quantised(model):
        if options.full:
            raise UnsupportedModelError(
                "quantised weights have no gradient: train adapters on them, or the 16-bit model"
            )
        if merge:
            raise UnsupportedModelError(f"--merge: {adapters.NOT_MERGED}")
    if not options.full:
        adapters.import_peft()
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            "the model has adapters already: merge them first (model.merge_and_unload()), or load "
            "the model anew"
        )


def _check_reporting(options: FinetuneOptions) -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in options.report_to:
        if name not in available:
            raise ConfigError(
                f"cannot report to {name!r}: install its package; "
                f"installed trackers: {', '.join(available) or 'none'}"
            )


def _check_sparsity(model: nn.Module, options: FinetuneOptions, calibration: Tensor | None) -> None:
    block = getattr(cast(CausalModel, model).config, "cats", None)
    # plain transformers loads a sparse checkpoint as a dense model, whose config has the block
    sparse = is_sparse(model)
    if block and not sparse:
        raise ConfigError(
            "the checkpoint is sparse, but its thresholds are not applied, so that it would be "
            "trained as a dense model: load it with cats.from_pretrained"
        )
    masked = next((name for name, m in model.named_modules() if isinstance(m, InputMask)), None)
    if masked is not None:
        assert block is not None
        raise UnsupportedModelError(
            f"{masked} drops inputs (method {block['method']!r}), which adapters and their merging "
            "would not follow: fine-tune with thresholds of cats, relu or neuron, which are on "
            "activations"
        )
    if options.distillation and not sparse:
        raise ConfigError(
            "distillation needs a sparse model: this dense one would be its own teacher; apply "
            "thresholds with cats.sparsify_, or leave out distillation"
        )
    if options.recalibrate:
        if not sparse or not block or block["target_sparsity"] is None:
            raise ConfigError(
                "recalibrate needs thresholds with a target sparsity, as those of CATS: apply them "
                "with cats.sparsify_, or leave out recalibrate"
            )
        if calibration is None:
            raise ConfigError("recalibrate needs calibration: token ids [N, T]")


def _check_kinds(examples: Mapping[str, object]) -> None:
    for name, data in examples.items():
        if not isinstance(data, Blocks | Pairs | StreamedBlocks):
            raise DataError(f"{name}: expected Blocks, Pairs or StreamedBlocks, got {type(data)}")


def _check_tokens(model: nn.Module, name: str, examples: Examples) -> None:
    """Check that examples fit into the model's context and vocabulary."""
    causal_model = cast(CausalModel, model)
    context = getattr(causal_model.config, "max_position_embeddings", None)
    if context is not None and longest(examples) > context:
        raise DataError(
            f"{name}: a row has {longest(examples)} tokens, the model's context {context}"
        )
    if isinstance(examples, StreamedBlocks):
        first = next(iter(examples), None)
        if first is None:
            raise DataError(f"{name}: the stream fills no block")
        examples = Blocks(first["input_ids"][None])
    low, high = token_range(examples)
    vocabulary = cast(int, causal_model.get_input_embeddings().num_embeddings)
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"{name}: token {low if low < 0 else high} is not in the model's vocabulary of "
            f"{vocabulary}: the tokenizer belongs to another model"
        )
