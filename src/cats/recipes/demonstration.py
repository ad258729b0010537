"""All of CATS on one model in a few minutes: quality, text and speed, dense and sparse."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cats.apply import sparsify_
from cats.benchmarks.decode import copy_for_fusion
from cats.benchmarks.decode_runs import run_transformers
from cats.calibration import calibrate
from cats.config import check_target
from cats.evaluation.profile import profile
from cats.evaluation.traffic import mean_share, neuron_shares, token_bytes
from cats.fusion import fuse_
from cats.metrics import perplexity, perplexity_and_sparsity
from cats.protocols import CausalModel, Tokenizer
from cats.recipes.demo_results import Demonstration, Side
from cats.recipes.generation import Answer, answer, encode, tokens_per_second
from cats.recipes.progress import Progress, duration
from cats.recipes.text import split
from cats.weights.placement import input_device

# Tokens per block of text.
BLOCK = 512
_BATCH = 4
# Rows and tokens of the batch whose activations are drawn: a profile counts unions of up to eight
# rows, and a short block shows the same as a long one.
_PROFILED = (8, 128)
# How often each loop answers, in turns with the others, since the load of a machine changes.
_ROUNDS = 3


def demonstrate(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: str | Iterable[str],
    *,
    prompt: str = "Explain in two sentences why the sky is blue.",
    target_sparsity: float = 0.5,
    tokens: int = 10_240,
    held_out_tokens: int = 8_000,
    max_new_tokens: int = 64,
    seed: int = 0,
    bos: bool | None = None,
    profiled: bool = False,
    model_name: str = "",
    text_name: str = "",
    progress: Progress | None = None,
) -> Demonstration:
    """Calibrate a model, and compare it with its sparse form.

    Args:
        model: A dense model; it stays dense.
        tokenizer: Its tokenizer.
        texts: Texts to calibrate on, and to measure perplexity on.
        prompt: Prompt of both models.
        target_sparsity: Share of neurons to drop, inside (0, 1).
        tokens: Largest number of calibration tokens.
        held_out_tokens: Largest number of tokens for perplexity.
        max_new_tokens: Largest number of tokens per answer, at least 2.
        seed: Seed of the draw of blocks.
        bos: As for :func:`cats.data.token_blocks`.
        profiled: Profile the activations as well.
        model_name: Name of the model in results.
        text_name: Name of the text in results.
        progress: Shows how long the demo will take, and each step.
    """
    progress = progress or Progress()
    causal = cast(CausalModel, model)
    check_target(target_sparsity)
    calibration, held = split(
        tokenizer,
        texts,
        block=BLOCK,
        tokens=tokens,
        held_out_tokens=held_out_tokens,
        seed=seed,
        bos=bos,
    )
    blocks, held_out = calibration.split(_BATCH), held.split(_BATCH)
    profile_batches = [held[: _PROFILED[0], : _PROFILED[1]]] if profiled else []
    # calibration runs once; perplexity and profiles run once dense and once sparse
    passes = (calibration, held, held, *profile_batches, *profile_batches)
    tokens_in_blocks = sum(b.numel() for b in passes)
    alone, in_block = _seconds_per_token(model, blocks[0])
    answered = 2 * len(("dense", "sparse")) * _ROUNDS * max_new_tokens
    seconds = tokens_in_blocks * in_block + answered * alone
    progress.say(f"about {duration(seconds)} at the speed of a first short batch")
    config = calibrate(
        model, progress.track(blocks, "calibrating"), target_sparsity=target_sparsity
    )
    profiles = {}
    if profiled:
        profiles["dense"] = profile(model, progress.track(profile_batches, "activations"))
    dense = perplexity(model, progress.track(held_out, "dense perplexity"))
    # the copy shares every weight
    sparse = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    sparsify_(sparse, config)
    sparse_perplexity, realized = perplexity_and_sparsity(
        sparse, progress.track(held_out, "CATS perplexity")
    )
    share = mean_share(sparse, neuron_shares(sparse, realized))
    if profiled:
        profiles["cats"] = profile(sparse, progress.track(profile_batches, "activations"))
    dense_speeds, sparse_speeds = _answers_in_turns(
        [(model, model), (sparse, fuse_(copy_for_fusion(sparse)))],
        tokenizer,
        prompt,
        max_new_tokens,
        progress,
    )
    return Demonstration(
        model=model_name,
        text=text_name,
        dtype=str(causal.dtype).removeprefix("torch."),
        device=str(causal.device),
        block=held.shape[1],
        seed=seed,
        target_sparsity=target_sparsity,
        calibration_tokens=config.calibration_tokens,
        calibration_hash=config.calibration_hash,
        held_out_tokens=held.numel(),
        thresholds={name: float(t) for name, t in config.thresholds.items()},
        realized_sparsity=realized,
        prompt=prompt,
        dense=Side(
            perplexity=dense, mlp_share=1.0, token_bytes=token_bytes(model, 1.0), **dense_speeds
        ),
        cats=Side(
            perplexity=sparse_perplexity,
            mlp_share=share,
            token_bytes=token_bytes(sparse, share),
            **sparse_speeds,
        ),
        profiles=profiles,
    )


def _seconds_per_token(model: nn.Module, blocks: Tensor) -> tuple[float, float]:
    """Seconds per token in a pass of one token, and in a pass of one block."""
    seconds = []
    blocks = blocks.to(input_device(model))
    with torch.inference_mode():
        for ids in (blocks[:1, :1], blocks[:1]):
            model(ids[:, :8], use_cache=False)
            start = time.perf_counter()
            logits = model(ids, use_cache=False).logits
            float(logits[0, -1, 0])  # waits for a GPU
            seconds.append((time.perf_counter() - start) / ids.numel())
    return seconds[0], seconds[1]


def _answers_in_turns(
    models: Sequence[tuple[nn.Module, nn.Module]],
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Answers and speeds of each pair of models.

    The first model of a pair answers through ``model.generate``, the second one through
    ``cats.generate``.

    Returns:
        Fields of :class:`Side` for each pair.
    """
    transformers_rounds: list[list[float]] = [[] for _ in models]
    answers: list[list[Answer]] = [[] for _ in models]
    with progress.count("answers", _ROUNDS * len(models) * max_new_tokens) as advance:
        for _ in range(_ROUNDS):
            for i, (unfused, fused) in enumerate(models):
                speed = _transformers_speed(unfused, tokenizer, prompt, max_new_tokens)
                transformers_rounds[i].append(speed)
                answers[i].append(
                    answer(
                        fused,
                        tokenizer,
                        prompt,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        on_token=advance,
                    )
                )
    return [
        {
            "answer": rounds[0],
            "rounds": [answered.tokens_per_second for answered in rounds],
            "transformers_rounds": speeds,
        }
        for rounds, speeds in zip(answers, transformers_rounds, strict=True)
    ]


def _transformers_speed(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, max_new_tokens: int
) -> float:
    """Tokens per second of ``model.generate``, without the pass over the prompt."""
    run = run_transformers(
        model,
        encode(tokenizer, prompt, chat=True).to(cast(CausalModel, model).device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return tokens_per_second(run.times)
