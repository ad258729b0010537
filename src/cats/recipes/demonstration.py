"""All of CATS on one model in a few minutes: quality, text and speed, dense and sparse."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cats.apply import sparsify_
from cats.benchmarks.copies import copy_for_fusion
from cats.benchmarks.decode_runs import run_transformers
from cats.calibration import collect
from cats.config import check_target, label_of
from cats.evaluation.profile import profile
from cats.evaluation.traffic import mean_share, mlp_shares, token_bytes
from cats.fusion import fuse_
from cats.metrics import perplexity, perplexity_and_shares
from cats.protocols import CausalModel, Tokenizer
from cats.recipes.demo_results import DENSE, Demonstration, Side
from cats.recipes.generation import Answer, answer, encode, tokens_per_second
from cats.recipes.progress import Progress, duration
from cats.recipes.splitting import split_masks
from cats.recipes.text import split
from cats.weights.placement import input_device

# Tokens per block of text.
BLOCK = 512
_BATCH = 4
# Rows and tokens of the batch whose activations are drawn: a profile counts unions of up to eight
# rows, and a short block shows the same as a long one.
_PROFILED = (8, 128)
# Blocks of the calibration text whose inputs and gradients serve the search for masks.
_SAMPLED = 8
# How often each loop answers, in turns with the others, since the load of a machine changes.
_ROUNDS = 3


def demonstrate(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: str | Iterable[str],
    *,
    prompt: str = "Explain in two sentences why the sky is blue.",
    sparsities: Sequence[float] = (0.5, 0.7),
    method: str = "cascade",
    tokens: int = 8_192,
    held_out_tokens: int = 6_144,
    max_new_tokens: int = 64,
    seed: int = 0,
    bos: bool | None = None,
    profiled: bool = False,
    model_name: str = "",
    text_name: str = "",
    progress: Progress | None = None,
) -> Demonstration:
    """Calibrate a model, and compare it with sparse forms: of CATS, and of another method.

    The other method reads the same bytes as CATS at each sparsity.

    Args:
        model: A dense model; it stays dense.
        tokenizer: Its tokenizer.
        texts: Texts to calibrate on, and to measure perplexity on.
        prompt: Prompt of all models.
        sparsities: Shares of neurons that CATS drops, inside (0, 1).
        method: A method with several masks.
        tokens: Largest number of calibration tokens.
        held_out_tokens: Largest number of tokens for perplexity.
        max_new_tokens: Largest number of tokens per answer, at least 2.
        seed: Seed of the draw of blocks.
        bos: As for :func:`cats.data.token_blocks`.
        profiled: Profile the activations as well, dense and at the first sparsity.
        model_name: Name of the model in results.
        text_name: Name of the text in results.
        progress: Shows how long the demo will take, and each step.
    """
    progress = progress or Progress()
    for sparsity in sparsities:
        check_target(sparsity)
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
    sampled = calibration[:_SAMPLED]
    profile_batches = [held[: _PROFILED[0], : _PROFILED[1]]] if profiled else []
    variants = 1 + 2 * len(sparsities)
    # gradients take as long as two more passes, and the search about as long as the passes
    passes = (calibration, *[sampled] * 6, *[held] * variants, *profile_batches, *profile_batches)
    tokens_in_blocks = sum(b.numel() for b in passes)
    alone, in_block = _seconds_per_token(model, blocks[0])
    answered = (1 + variants) * _ROUNDS * max_new_tokens
    seconds = tokens_in_blocks * in_block + answered * alone
    progress.say(f"about {duration(seconds)} at the speed of a first short batch")
    statistics = collect(model, progress.track(blocks, "calibrating"))
    masks = split_masks(model, sampled, method=method, batch_size=_BATCH, progress=progress)
    configs = [statistics.config(sparsity) for sparsity in sparsities]
    # CATS reads gate whole, and the share that it keeps of two matrices of three
    configs += [masks.config(max(1 - 2 / 3 * s, masks.paths.lowest)) for s in sparsities]
    profiles = {}
    if profiled:
        profiles["dense"] = profile(model, progress.track(profile_batches, "activations"))
    dense = perplexity(model, progress.track(held_out, "dense perplexity"))
    sides: dict[str, dict[str, Any]] = {}
    sides[DENSE] = {"perplexity": dense, "mlp_share": 1.0, "token_bytes": token_bytes(model)}
    models: dict[str, nn.Module] = {DENSE: model}
    for config in configs:
        label = label_of(config.method, config.target_sparsity, config.target_bytes)
        # the copy shares every weight
        sparse = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        sparsify_(sparse, config)
        measured = progress.track(held_out, f"{label} perplexity")
        value, realized, read = perplexity_and_shares(sparse, measured)
        sides[label] = {
            "perplexity": value,
            "mlp_share": mean_share(sparse, mlp_shares(sparse, read)),
            "token_bytes": token_bytes(sparse, read),
            "target_sparsity": config.target_sparsity,
            "target_bytes": config.target_bytes,
            "realized_sparsity": realized,
        }
        if profiled and len(models) == 1:
            profiles["cats"] = profile(sparse, progress.track(profile_batches, "activations"))
        models[label] = fuse_(copy_for_fusion(sparse))
    speeds = _answers_in_turns(models, tokenizer, prompt, max_new_tokens, progress)
    return Demonstration(
        model=model_name,
        text=text_name,
        dtype=str(cast(CausalModel, model).dtype).removeprefix("torch."),
        device=str(cast(CausalModel, model).device),
        block=held.shape[1],
        seed=seed,
        calibration_tokens=statistics.tokens,
        calibration_hash=f"{statistics.text_hash:016x}",
        held_out_tokens=held.numel(),
        prompt=prompt,
        sides={name: Side(**side, **speeds[name]) for name, side in sides.items()},
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
    models: Mapping[str, nn.Module],
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Answers and speeds of each model through ``cats.generate``.

    The dense model answers through ``model.generate`` as well.

    Returns:
        Name of each model to fields of :class:`Side`.
    """
    transformers_rounds: list[float] = []
    answers: dict[str, list[Answer]] = {name: [] for name in models}
    with progress.count("answers", _ROUNDS * len(models) * max_new_tokens) as advance:
        for _ in range(_ROUNDS):
            dense = models[DENSE]
            speed = _transformers_speed(dense, tokenizer, prompt, max_new_tokens)
            transformers_rounds.append(speed)
            for name, model in models.items():
                answers[name].append(
                    answer(
                        model,
                        tokenizer,
                        prompt,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        on_token=advance,
                    )
                )
    return {
        name: {
            "answer": rounds[0],
            "rounds": [answered.tokens_per_second for answered in rounds],
            "transformers_rounds": transformers_rounds if name == DENSE else [],
        }
        for name, rounds in answers.items()
    }


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
