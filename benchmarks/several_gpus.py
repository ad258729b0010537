"""What two GPUs of one machine give: the same numbers as one, and how much faster.

    python benchmarks/several_gpus.py OUT.jsonl --model smollm2 --text c4.txt.gz

Each step runs in processes of its own, adds lines to OUT.jsonl and is left out where its lines are
there already. `--steps` chooses some of: calibrate, finetune, split, apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STEPS = ("calibrate", "finetune", "split", "apart")
NEW_TOKENS = 256
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text")
    parser.add_argument("--shape", default="mistral-7b", help="of the model that is split")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        WORKERS[options.worker](options)
        return
    for step in options.steps.split(","):
        print(time.strftime("%T"), step, flush=True)
        if not has_lines(options.output, step):
            RUNS[step](options)


def has_lines(output: Path, step: str) -> bool:
    from cats.results import read_results

    return output.exists() and any(r.settings["task"] == step for r in read_results(output))


def add(
    output: Path, task: str, variant: str, gpus: int, values: list[float], **found: Any
) -> None:
    """Append one line: the median of some values with its quartiles."""
    from cats.results import SeveralGPUs, append_results, environment

    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    line = SeveralGPUs(
        value=middle,
        low=low,
        high=high,
        samples=len(values),
        task=task,
        variant=variant,
        gpus=gpus,
        environment=environment("cuda"),
        **found,
    )
    append_results(output, [line])
    print(f"  {variant}, {gpus} GPUs: {middle:.1f} {line.unit}", found, flush=True)


def launch(gpus: int, *command: str, environment: dict[str, str] | None = None) -> None:
    """Run a Python command as one process, or as one process per GPU under torchrun."""
    launcher = f"-m torch.distributed.run --nproc-per-node {gpus} --standalone".split()
    visible = {} if gpus > 1 else {"CUDA_VISIBLE_DEVICES": "0"}
    subprocess.run(
        [sys.executable, *(launcher if gpus > 1 else ()), *command],
        env=os.environ | visible | (environment or {}),
        check=True,
    )


# ---- calibration: the same thresholds, bit for bit


def calibrate(options: argparse.Namespace) -> None:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{gpus}.safetensors" for gpus in (1, 2)]
        for gpus, file in zip((1, 2), files, strict=True):
            launch(
                gpus,
                "-m",
                "cats",
                "calibrate",
                options.model,
                "--text",
                options.text,
                "--tokens",
                "200000",
                "--dtype",
                "bfloat16",
                "-o",
                str(file),
            )
        one, two = map(load_file, files)
    same = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    rates = Path(tempfile.mkdtemp()) / "rates"
    for gpus in (1, 2):
        launch(gpus, *worker(options, "count", rates))
        values = json.loads(rates.read_text())
        add(options.output, "calibrate", "cats calibrate", gpus, values, same_as_one=same)


def count(options: argparse.Namespace) -> None:
    """Tokens per second of the counting, without loading."""
    from cats import recipes
    from cats.cli.options import Dtype, load, process_device
    from cats.data import read_text, token_blocks
    from cats.recipes.processes import join_processes

    rank, _ = join_processes()
    device = process_device("auto")
    model, tokenizer = load(options.model, dtype=Dtype.bfloat16, device=device, dense=True)
    blocks = token_blocks(tokenizer, read_text(options.text))[:384].repeat(4, 1)
    rates = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        recipes.count(model, blocks, batch_size=16)
        torch.cuda.synchronize()
        rates.append(blocks.numel() / (time.perf_counter() - start))
    if rank == 0:
        options.output.write_text(json.dumps(rates[1:]))


# ---- fine-tuning: the losses of one GPU with twice the batch


def finetune(options: argparse.Namespace) -> None:
    from cats.history import History

    histories = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant, gpus, rows, environment in (
            ("one process", 1, 16, {}),
            ("DDP", 2, 8, {}),
            ("FSDP2", 2, 8, FSDP2),
        ):
            output = Path(folder) / variant
            launch(
                gpus,
                "-m",
                "cats",
                "finetune",
                options.model,
                "--method",
                "cats",
                "--text",
                f"{options.text}[:50%]",
                "--eval-text",
                f"c4={options.text}[50%:]",
                "--calibration-text",
                f"{options.text}[:50%]",
                "--eval-tokens",
                "40960",
                "--dtype",
                "float32",
                "--no-bf16",
                "--dropout",
                "0",
                "--lr",
                "1e-4",
                "--batch-size",
                str(rows),
                "--steps",
                "60",
                "--eval-every",
                "30",
                "-o",
                str(output),
                environment=environment,
            )
            histories[variant] = gpus, History.load(output / "history.jsonl")
    reference = histories["one process"][1]
    for variant, (gpus, history) in histories.items():
        pairs = zip(history.points, reference.points, strict=True)
        difference = max(
            abs(a.losses[name] / b.losses[name] - 1) for a, b in pairs for name in b.losses
        )
        seconds = [p.seconds_per_step for p in history.points if p.seconds_per_step]
        tokens = history.points[-1].tokens / history.points[-1].step
        rates = [tokens / value for value in seconds]
        add(options.output, "finetune", variant, gpus, rates, difference=difference)


# ---- one model over two GPUs: the exact path


def split(options: argparse.Namespace) -> None:
    subprocess.run([sys.executable, *worker(options, "split", options.output)], check=True)


def split_worker(options: argparse.Namespace) -> None:
    from accelerate import dispatch_model, infer_auto_device_map

    import cats
    from cats.benchmarks.shapes import random_model

    torch.manual_seed(0)
    model = random_model(options.shape, torch.bfloat16, torch.device("cuda", 0))
    ids = torch.randint(model.config.vocab_size, (8, 512), device="cuda:0")
    config = cats.calibrate(model, ids.split(4), target_sparsity=0.5)
    prompt = ids[:1, :32]
    variants: dict[str, Callable[[], torch.Tensor]] = {
        "transformers": lambda: model.generate(
            prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        ),
        "cats.generate": lambda: cats.generate(
            model, prompt, max_new_tokens=NEW_TOKENS, eos_token_id=[]
        ),
    }
    cats.sparsify_(model, config)
    with torch.inference_mode():
        logits = model(ids[:1]).logits.float()
    rates = {name: rates_of(run) for name, run in variants.items()}
    for name, values in rates.items():
        add(options.output, "split", name, 1, values, same_as_one=True)
    cats.densify_(model)
    cats.release(model)
    half = sum(p.nbytes for p in model.parameters()) * 6 // 10
    layer = type(model.model.layers[0]).__name__
    limits = {0: half, 1: 2 * half}
    places = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=[layer])
    dispatch_model(model, places)
    devices = {p.device for p in model.parameters()}
    assert len(devices) == 2, devices
    again = cats.calibrate(model, ids.split(4), target_sparsity=0.5)
    same = all(
        torch.equal(a, b.to(a.device))
        for one, two in zip(config.tensors.values(), again.tensors.values(), strict=True)
        for a, b in zip(one.values(), two.values(), strict=True)
    )
    cats.sparsify_(model, again)
    with torch.inference_mode():
        found = model(ids[:1]).logits.float().to(logits.device)
    difference = float((found - logits).norm() / logits.norm())
    tokens = [run().cpu() for run in variants.values()]
    print("  the same tokens as transformers:", torch.equal(*tokens))
    try:
        cats.generate(model, prompt, max_new_tokens=2, engine="stream")
    except cats.CatsError as error:
        print("  engine='stream':", error)
    for name, run in variants.items():
        add(
            options.output, "split", name, 2, rates_of(run), same_as_one=same, difference=difference
        )


def rates_of(run: Callable[[], torch.Tensor], rounds: int = 4) -> list[float]:
    """New tokens per second, the first call left out."""
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        rates.append(NEW_TOKENS / (time.perf_counter() - start))
    return rates[1:]


# ---- two models, one per GPU, at once


def apart(options: argparse.Namespace) -> None:
    subprocess.run([sys.executable, *worker(options, "apart", options.output)], check=True)


def apart_worker(options: argparse.Namespace) -> None:
    import cats
    from cats.benchmarks.shapes import random_model

    decoders, prompts = [], []
    for index in (0, 1):
        device = torch.device("cuda", index)
        model = random_model(options.shape, torch.bfloat16, device)
        decoders.append(cats.Decoder(model, engine="stream"))
        prompts.append(torch.arange(32, device=device)[None] + index)

    def rates(index: int, rounds: int) -> list[float]:
        """Tokens per second after the first token of each answer."""
        found = []
        for _ in range(rounds):
            times: list[float] = []
            decoders[index].generate(
                prompts[index],
                max_new_tokens=NEW_TOKENS,
                eos_token_id=[],
                callback=lambda _, times=times: times.append(time.perf_counter()),
            )
            found.append((NEW_TOKENS - 1) / (times[-1] - times[0]))
        return found

    for index in (0, 1):
        rates(index, 2)
    alone = [rates(index, 7) for index in (0, 1)]
    both: list[list[float]] = [[], []]

    def run(index: int) -> None:
        both[index] += rates(index, 9)[1:-1]

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        add(options.output, "apart", f"GPU {index} alone", 1, alone[index])
        share = statistics.median(both[index]) / statistics.median(alone[index]) - 1
        add(
            options.output,
            "apart",
            f"GPU {index} beside the other",
            2,
            both[index],
            difference=share,
        )


def worker(options: argparse.Namespace, name: str, output: Path) -> list[str]:
    text = ["--text", options.text] if options.text else []
    own = [__file__, str(output), "--model", options.model, "--shape", options.shape]
    return [*own, *text, "--worker", name]


RUNS = {"calibrate": calibrate, "finetune": finetune, "split": split, "apart": apart}
WORKERS = {"count": count, "split": split_worker, "apart": apart_worker}

if __name__ == "__main__":
    main()
