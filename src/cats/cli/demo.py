"""``cats demo``: the whole of CATS on a real model, in a few minutes on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats.cli import options

if TYPE_CHECKING:
    from torch import Tensor

    from cats.results import Result

# Tokens a block of text.
_BLOCK = 512
# Rows and tokens of the batch whose activations are drawn: unions over up to eight tokens are
# measured, and a short block shows what a long one does.
_PROFILED = (8, 128)
# How often each loop answers, in turns with the others: the load of a machine changes meanwhile.
_ROUNDS = 3


def demo(
    sparsity: Annotated[float, typer.Option(help="Target sparsity, inside (0, 1).")] = 0.5,
    text: options.Texts = None,
    tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens.")] = 10_240,
    eval_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens.")] = 8_000,
    prompt: Annotated[str, typer.Option(help="What both models answer.")] = (
        "Explain in two sentences why the sky is blue."
    ),
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    seed: options.Seed = 0,
    bos: options.Bos = None,
    model: Annotated[
        str, typer.Option(help="Another model: a folder or Hugging Face id.")
    ] = "smollm2",
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the results as JSON, and report.html made of them."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Calibrate SmolLM2-135M-Instruct, and compare dense and sparse: quality, text, speed.

    Example: [b]cats demo --sparsity 0.7 --prompt "What is a cat?"[/b]
    """
    from cats.config import check_target

    check_target(sparsity)
    options.check_tokens(tokens, _BLOCK)
    options.check_tokens(eval_tokens, _BLOCK, "--eval-tokens")
    if output is not None:
        options.check_output(output / "report.html")
        _check_plots()
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, tokenizer = options.load(
        model, dtype=dtype, device=device, dense=True, hub=hub, threads=threads
    )
    report, profiles = _run(
        loaded, tokenizer, sparsity, text, tokens, eval_tokens, prompt, max_new_tokens, seed, bos,
        profiled=output is not None,
    )  # fmt: skip
    report = {"model": model, "text": options.describe_texts(text), **report}
    if output is not None:
        _write(output, report, profiles)
    if as_json:
        options.print_json(report)
    else:
        _print(report)
        if output is not None:
            options.out.print(f"wrote {output / 'report.html'}", markup=False)


def _check_plots() -> None:
    from importlib.util import find_spec

    from cats.errors import DataError

    if find_spec("matplotlib") is None:
        raise DataError("a report needs matplotlib: pip install 'cats-llm[report]'")


def _run(
    model: Any,
    tokenizer: Any,
    sparsity: float,
    text: list[Path] | None,
    tokens: int,
    eval_tokens: int,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    bos: bool | None,
    *,
    profiled: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was measured; and, where asked for, dense and sparse activations."""
    import copy

    import torch

    from cats.apply import sparsify_
    from cats.benchmarks.decode import copy_for_fusion
    from cats.calibration import calibrate
    from cats.cli.calibrate import split
    from cats.cli.running import duration
    from cats.evaluation.profile import profile
    from cats.evaluation.traffic import mean_share, neuron_share, token_bytes
    from cats.fusion import fuse_
    from cats.metrics import perplexity, perplexity_and_sparsity

    blocks, held_out = (
        part.split(4)
        for part in split(tokenizer, text, None, _BLOCK, tokens, eval_tokens, seed, bos)
    )
    seen = [torch.cat(held_out)[: _PROFILED[0], : _PROFILED[1]]] if profiled else []
    # calibration once; perplexity and activations once dense and once sparse
    read = sum(b.numel() for b in (*blocks, *held_out, *held_out, *seen, *seen))
    step, token = _seconds_of_a_token(model, blocks[0])
    answers = 2 * len(("dense", "sparse")) * _ROUNDS * max_new_tokens
    options.err.print(
        f"about {duration(read * token + answers * step)} at the speed of a first short batch",
        highlight=False,
    )
    config = calibrate(model, options.progress(blocks, "calibrating"), target_sparsity=sparsity)
    profiles = {}
    if seen:
        profiles["dense"] = profile(model, options.progress(seen, "activations"))
    dense_perplexity = perplexity(model, options.progress(held_out, "dense perplexity"))
    # shares every weight
    sparse = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    sparsify_(sparse, config)
    sparse_perplexity, realized = perplexity_and_sparsity(
        sparse, options.progress(held_out, "CATS perplexity")
    )
    share = mean_share(sparse, {name: neuron_share(s) for name, s in realized.items()})
    if seen:
        profiles["cats"] = profile(sparse, options.progress(seen, "activations"))
    dense_speeds, sparse_speeds = _answers_in_turns(
        [(model, model), (sparse, fuse_(copy_for_fusion(sparse)))],
        tokenizer, prompt, max_new_tokens,
    )  # fmt: skip
    dense = {
        "perplexity": dense_perplexity,
        "mlp_share": 1.0,
        "token_bytes": token_bytes(model, 1.0),
        **dense_speeds,
    }
    cats = {
        "perplexity": sparse_perplexity,
        "mlp_share": share,
        "token_bytes": token_bytes(sparse, share),
        **sparse_speeds,
    }
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "block": held_out[0].shape[1],
        "seed": seed,
        "target_sparsity": sparsity,
        "calibration_tokens": config.calibration_tokens,
        "calibration_hash": config.calibration_hash,
        "held_out_tokens": sum(b.numel() for b in held_out),
        "thresholds": {name: float(t) for name, t in config.thresholds.items()},
        "realized_sparsity": realized,
        "prompt": prompt,
        "dense": dense,
        "cats": cats,
    }, profiles


def _seconds_of_a_token(model: Any, blocks: Tensor) -> tuple[float, float]:
    """Seconds that a token takes alone, and as one of a block: measured on a first short one."""
    import time

    import torch

    seconds = []
    with torch.inference_mode():
        for ids in (blocks[:1, :1], blocks[:1]):
            model(ids[:, :8], use_cache=False)
            start = time.perf_counter()
            logits = model(ids, use_cache=False).logits
            float(logits[0, -1, 0])  # a GPU has finished then
            seconds.append((time.perf_counter() - start) / ids.numel())
    return seconds[0], seconds[1]


def _write(folder: Path, report: dict[str, Any], profiles: dict[str, Any]) -> None:
    """Results and profiles of this run in the place of those of an earlier one, and the page."""
    from cats.report import Material, write_page
    from cats.storage import replacing

    with replacing(folder / "results.jsonl") as temporary:
        temporary.write_text("".join(r.to_json() + "\n" for r in _results(report)))
    about = {key: report[key] for key in ("model", "text", "block")}
    sparse = {"method": "cats", "target_sparsity": report["target_sparsity"]}
    files = [folder / "results.jsonl"]
    for name, found in profiles.items():
        files.append(folder / f"profile-{name}.json")
        found.save(files[-1], **about, cats=sparse if name == "cats" else None)
    write_page(
        Material.read(files), folder / "report.html", title=f"CATS on {report['model']}: a demo"
    )


def _results(report: dict[str, Any]) -> list[Result]:
    """Perplexity, and the time of a token through both loops, dense and sparse."""
    from statistics import median, quantiles

    from cats.config import label_of
    from cats.results import Result, environment

    where = environment(report["device"])
    target = report["target_sparsity"]
    dropped = sum(report["realized_sparsity"].values()) / len(report["realized_sparsity"])
    common = {key: report[key] for key in ("model", "dtype", "seed", "calibration_tokens")}

    def result(
        benchmark: str, quantity: str, values: list[float], unit: str, **more: Any
    ) -> Result:
        low, _, high = quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
        return Result(
            benchmark=benchmark, quantity=quantity, value=median(values), unit=unit,
            low=low, high=high, samples=len(values), settings=common | more,
            environment=where,
        )  # fmt: skip

    found = []
    for name, sparsity in (("dense", 0.0), ("cats", target)):
        row = report[name]
        found.append(
            result(
                "perplexity", "perplexity", [row["perplexity"]], "",
                variant=label_of(name, sparsity or None), method=name,
                target_sparsity=sparsity or None, realized_sparsity=dropped if sparsity else None,
                text=f"{report['text']}, held out", tokens=report["held_out_tokens"],
                block=report["block"], mlp_share=row["mlp_share"], token_bytes=row["token_bytes"],
                calibration_hash=report["calibration_hash"],
            )
        )  # fmt: skip
        speeds = {
            f"cats.generate, {row['engine']}": row["rounds"],
            "model.generate": row["transformers_rounds"],
        }
        # an answer of one token has no step to time
        found += [
            result(
                "demo", "time", [1e3 / speed for speed in rounds], "ms", variant=loop,
                sparsity=sparsity, realized_sparsity=dropped if sparsity else 0.0,
                prompt=report["prompt"],
            )
            for loop, rounds in speeds.items()
            if min(rounds) > 0
        ]  # fmt: skip
    return found


def _answers_in_turns(
    models: list[tuple[Any, Any]], tokenizer: Any, prompt: str, max_new_tokens: int
) -> list[dict[str, Any]]:
    """What each pair of models answers, and how fast: the first through ``model.generate``, the
    second through ``cats.generate``.

    Returns:
        What :func:`cats.cli.generate.run` does, the speeds of all rounds, and their medians.
    """
    from statistics import median

    from cats.cli.generate import run

    plain: list[list[float]] = [[] for _ in models]
    answers: list[list[dict[str, Any]]] = [[] for _ in models]
    with options.counter("answers", _ROUNDS * len(models) * max_new_tokens) as advance:
        for _ in range(_ROUNDS):
            for i, (unfused, served) in enumerate(models):
                plain[i].append(_plain_speed(unfused, tokenizer, prompt, max_new_tokens))
                answers[i].append(
                    run(
                        served, tokenizer, prompt, max_new_tokens=max_new_tokens, do_sample=False,
                        callback=lambda tokens: advance(),
                    )
                )  # fmt: skip
    found = []
    for speeds, answer in zip(plain, answers, strict=True):
        rounds = [a["tokens_per_second"] for a in answer]
        found.append(
            {
                **answer[0],
                "tokens_per_second": median(rounds),
                "rounds": rounds,
                "transformers_tokens_per_second": median(speeds),
                "transformers_rounds": speeds,
            }
        )
    return found


def _plain_speed(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> float:
    """Tokens a second of ``model.generate``, without the pass over the prompt."""
    from cats.benchmarks.decode_runs import run_transformers
    from cats.cli.generate import encode, tokens_per_second

    run = run_transformers(
        model,
        encode(tokenizer, prompt, chat=True).to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return tokens_per_second(run.times)


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table

    from cats.cli.tables import layer_table
    from cats.report import Material

    dense, sparse = report["dense"], report["cats"]
    name = f"CATS-{report['target_sparsity'] * 100:g}"
    out = options.out
    out.print(layer_table(report["thresholds"], report["realized_sparsity"]))
    out.print(f"[b]{escape(report['prompt'])}[/b]")
    out.print(Panel(escape(dense["text"].strip()), title="dense", title_align="left"))
    out.print(Panel(escape(sparse["text"].strip()), title=name, title_align="left"))
    table = Table()
    table.add_column("model")
    table.add_column("perplexity on held-out text", justify="right")
    table.add_column("tokens per second, transformers", justify="right")
    table.add_column("tokens per second, cats", justify="right")
    for label, row in (("dense", dense), (name, sparse)):
        table.add_row(
            label,
            f"{row['perplexity']:.2f}",
            f"{row['transformers_tokens_per_second']:.1f}",
            f"{row['tokens_per_second']:.1f}",
        )
    out.print(table)
    for tradeoff in Material(results=_results(report)).tradeoffs():
        out.print(f"[b]{escape(tradeoff.sentence())}[/b]", highlight=False)
    out.print(
        f"transformers: model.generate. cats: cats.generate with the engine {sparse['engine']}; "
        f"{name} runs with fused MLPs there. Each speed is the median of {len(sparse['rounds'])} "
        "runs in turns.",
        style="dim",
    )
    out.print(
        f"Calibrated on {report['calibration_tokens']:,} tokens and measured on "
        f"{report['held_out_tokens']:,} held-out tokens of {report['text']}, "
        f"seed {report['seed']}.",
        style="dim",
        markup=False,
    )
