"""The whole of CATS on one model in a few minutes: quality, text and speed, dense and sparse."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cats.apply import sparsify_
from cats.benchmarks.decode import copy_for_fusion
from cats.benchmarks.decode_runs import run_transformers
from cats.calibration import calibrate
from cats.config import check_target
from cats.evaluation.profile import profile
from cats.evaluation.traffic import mean_share, neuron_shares, token_bytes
from cats.fusion import fuse_
from cats.metrics import perplexity, perplexity_and_sparsity
from cats.recipes.demo_results import Demonstration, Side
from cats.recipes.generation import Answer, answer, encode, tokens_per_second
from cats.recipes.progress import Progress, duration
from cats.recipes.text import split
from cats.weights.placement import input_device

# Tokens of a block of text.
BLOCK = 512
_BATCH = 4
# Rows and tokens of the batch whose activations are drawn: unions over up to eight tokens are
# measured, and a short block shows what a long one does.
_PROFILED = (8, 128)
# How often each loop answers, in turns with the others: the load of a machine changes meanwhile.
_ROUNDS = 3


def demonstrate(
    model: Any,
    tokenizer: Any,
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
        texts: To calibrate on, and to measure perplexity on.
        prompt: What both answer.
        target_sparsity: Share of neurons to drop, inside (0, 1).
        tokens: For calibration, at most.
        held_out_tokens: For perplexity, at most.
        max_new_tokens: Of an answer, at least 2.
        seed: Of the draw of blocks.
        bos: As for :func:`cats.data.token_blocks`.
        profiled: Look at the activations as well.
        model_name: What results call the model.
        text_name: What they call the text.
        progress: Told how long it will take, and what is going on.
    """
    progress = progress or Progress()
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
    seen = [held[: _PROFILED[0], : _PROFILED[1]]] if profiled else []
    # calibration once; perplexity and activations once dense and once sparse
    read = sum(b.numel() for b in (calibration, held, held, *seen, *seen))
    step, token = _seconds_of_a_token(model, blocks[0])
    answers = 2 * len(("dense", "sparse")) * _ROUNDS * max_new_tokens
    progress.say(
        f"about {duration(read * token + answers * step)} at the speed of a first short batch"
    )
    config = calibrate(
        model, progress.track(blocks, "calibrating"), target_sparsity=target_sparsity
    )
    profiles = {}
    if seen:
        profiles["dense"] = profile(model, progress.track(seen, "activations"))
    dense = perplexity(model, progress.track(held_out, "dense perplexity"))
    # shares every weight
    sparse = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    sparsify_(sparse, config)
    cats, realized = perplexity_and_sparsity(sparse, progress.track(held_out, "CATS perplexity"))
    share = mean_share(sparse, neuron_shares(sparse, realized))
    if seen:
        profiles["cats"] = profile(sparse, progress.track(seen, "activations"))
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
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
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
            perplexity=cats,
            mlp_share=share,
            token_bytes=token_bytes(sparse, share),
            **sparse_speeds,
        ),
        profiles=profiles,
    )


def _seconds_of_a_token(model: Any, blocks: Tensor) -> tuple[float, float]:
    """Seconds that a token takes alone, and as one of a block: measured on a first short one."""
    seconds = []
    blocks = blocks.to(input_device(model))
    with torch.inference_mode():
        for ids in (blocks[:1, :1], blocks[:1]):
            model(ids[:, :8], use_cache=False)
            start = time.perf_counter()
            logits = model(ids, use_cache=False).logits
            float(logits[0, -1, 0])  # a GPU has finished then
            seconds.append((time.perf_counter() - start) / ids.numel())
    return seconds[0], seconds[1]


def _answers_in_turns(
    models: Sequence[tuple[Any, Any]],
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What each pair of models answers: the first through ``model.generate``, the second through
    ``cats.generate``.

    Returns:
        Fields of :class:`Side` for each pair.
    """
    plain: list[list[float]] = [[] for _ in models]
    answers: list[list[Answer]] = [[] for _ in models]
    with progress.count("answers", _ROUNDS * len(models) * max_new_tokens) as advance:
        for _ in range(_ROUNDS):
            for i, (unfused, served) in enumerate(models):
                plain[i].append(_plain_speed(unfused, tokenizer, prompt, max_new_tokens))
                answers[i].append(
                    answer(
                        served,
                        tokenizer,
                        prompt,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        on_token=advance,
                    )
                )
    return [
        {
            "answer": found[0],
            "rounds": [a.tokens_per_second for a in found],
            "transformers_rounds": speeds,
        }
        for found, speeds in zip(answers, plain, strict=True)
    ]


def _plain_speed(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> float:
    """Tokens per second of ``model.generate``, without the pass over the prompt."""
    run = run_transformers(
        model,
        encode(tokenizer, prompt, chat=True).to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return tokens_per_second(run.times)
