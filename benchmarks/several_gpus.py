"""What two GPUs of one machine give: the same numbers as one, and how much faster.

    python benchmarks/several_gpus.py OUT.jsonl --model smollm2 --text c4.txt.gz

Every measurement runs in processes of its own and adds its line to OUT.jsonl as soon as it has it.
What has its line there already is left out, what fails is said at the end and stops nothing else.
Histories of fine-tuning are kept beside OUT.jsonl. The first step decides the most, the last one
the least:

finetune   Losses of two processes against one with twice the batch. The controls say what rounding
           does: one process that sums each batch in two parts, and the dense model, whose neurons
           no threshold switches.
split      One model over two GPUs. same_as_one: the tokens of transformers on one GPU, which only
           float32 promises: in bfloat16, several of the best tokens have the same logit.
calibrate  Counting by two processes. same_as_one: the thresholds are those of one, bit for bit.
apart      Two models at once, one per GPU.

``--device cpu`` tries the steps without GPUs: processes share the CPU, and a disk is the second
device of ``split``. FSDP2 and ``apart`` need GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
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

from cats.errors import BackendError, CatsError
from cats.results import SeveralGPUs, append_results, environment, read_results

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
# Method, processes, forward passes per step and environment; the first of a method is its reference
TRAININGS = {
    "one process": ("cats", 1, 1, {}),
    "DDP": ("cats", 2, 1, {}),
    "FSDP2": ("cats", 2, 1, FSDP2),
    "one process, two passes": ("cats", 1, 2, {}),
    "dense, one process": ("dense", 1, 1, {}),
    "dense, DDP": ("dense", 2, 1, {}),
}


def main() -> None:
    options = parse()
    if options.worker:
        WORKERS[options.worker](options)
        return
    failed = []
    for step in options.steps.split(","):
        start = time.monotonic()
        say(f"== {step}")
        failed += STEPS[step](options)
        say(f"== {step}: {time.monotonic() - start:.0f} s")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", default=",".join(STEPS), help="some of them, in this order")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=int, default=150, help="seconds of one measurement")
    parser.add_argument("--model", default="smollm2", help="that is fine-tuned and calibrated")
    parser.add_argument("--text", required=True, help="to learn, to count and to measure on")
    parser.add_argument("--train-steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step of fine-tuning")
    parser.add_argument("--block", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--eval-tokens", type=int, default=40960)
    parser.add_argument("--shape", default="mistral-7b", help="of the models split and apart")
    parser.add_argument("--layers", type=int, help="of this shape; default: all")
    parser.add_argument("--exact-layers", type=int, default=4, help="of the float32 model")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--count-tokens", type=int, default=786432)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--thresholds", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def say(text: str) -> None:
    print(time.strftime("%T"), text, flush=True)


def has_line(options: argparse.Namespace, task: str, variant: str | None = None) -> bool:
    """Whether the output has a line of this variant, or of any."""
    if not options.output.exists():
        return False
    found = [r.settings for r in read_results(options.output)]
    return any(s["task"] == task and variant in (None, s["variant"]) for s in found)


def add(
    options: argparse.Namespace,
    task: str,
    variant: str,
    gpus: int,
    values: list[float],
    **more: Any,
) -> None:
    """Append one line: the median of some values with its quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    line = SeveralGPUs(
        value=middle,
        low=low,
        high=high,
        samples=len(values),
        task=task,
        variant=variant,
        gpus=gpus,
        environment=environment(options.device),
        **more,
    )
    append_results(options.output, [line])
    say(f"  {variant}, {gpus} {options.device}: {middle:.1f} {line.unit} {more or ''}")


def launch(
    options: argparse.Namespace,
    processes: int,
    *command: str,
    environment: dict[str, str] | None = None,
) -> bool:
    """Run a Python command as one process, or under torchrun; False if it fails or takes too long.

    Processes that wait for each other would wait for ever, so all of them are ended at the limit.
    """
    launcher = f"-m torch.distributed.run --nproc-per-node {processes} --standalone".split()
    # some images let float32 products use TF32
    own = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
    if options.device == "cpu":
        own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    elif processes == 1 and not any(word.startswith("--worker=") for word in command):
        own |= {"CUDA_VISIBLE_DEVICES": "0"}
    run = subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else ()), *command],
        env=os.environ | own | (environment or {}),
        start_new_session=True,
    )
    try:
        code = run.wait(timeout=options.limit)
    except subprocess.TimeoutExpired:
        say(f"  ended: not done after {options.limit} s")
        end(run)
        return False
    except BaseException:
        end(run)
        raise
    if code:
        say(f"  failed with exit code {code}")
    return code == 0


def end(run: subprocess.Popen[bytes]) -> None:
    """End a process; torchrun ends its own processes when it is told to, and has time for it."""
    run.terminate()
    try:
        run.wait(timeout=45)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def worker(options: argparse.Namespace, name: str, *more: str) -> list[str]:
    """The command that runs a worker with the same options."""
    hidden = ("steps", "worker", "processes", "thresholds", "output")
    values = {k: v for k, v in vars(options).items() if v is not None and k not in hidden}
    named = [f"--{k.replace('_', '-')}={v}" for k, v in values.items()]
    return [__file__, str(options.output), *named, f"--worker={name}", *more]


# ---- fine-tuning: the losses of one GPU with twice the batch


def finetune(options: argparse.Namespace) -> list[str]:
    from cats.history import History

    folder = options.output.parent / f"{options.output.stem}-finetune"
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for variant, (method, processes, passes, setting) in TRAININGS.items():
        path = folder / f"{variant.replace(', ', '-').replace(' ', '-')}.jsonl"
        if has_line(options, "finetune", variant):
            continue
        if setting and options.device == "cpu":
            say(f"  {variant}: left out, since accelerate shards on GPUs only")
            continue
        say(f"  {variant} ...")
        if not train(options, path, method, processes, passes, setting):
            failed.append(f"finetune, {variant}")
            continue
        history = History.load(path)
        names = {n: t[0] for n, t in TRAININGS.items()}
        first = next(name for name in names if names[name] == method)
        reference = folder / f"{first.replace(', ', '-').replace(' ', '-')}.jsonl"
        if not reference.exists():
            failed.append(f"finetune, {variant}: nothing to compare with")
            continue
        pairs = [*zip(history.points, History.load(reference).points, strict=True)]
        differences = [
            max(abs(a.losses[name] / b.losses[name] - 1) for name in b.losses) for a, b in pairs
        ]
        for (point, other), difference in zip(pairs, differences, strict=True):
            say(
                f"    step {point.step}: {point.losses}, train {point.train_loss}; {difference:.1e}"
            )
            if point.tokens != other.tokens:
                failed.append(f"finetune, {variant}: other tokens at step {point.step}")
        if differences[0] > 1e-6:
            failed.append(f"finetune, {variant}: another evaluation of the same weights")
        tokens = history.points[-1].tokens / history.points[-1].step
        rates = [tokens / p.seconds_per_step for p in history.points if p.seconds_per_step]
        add(options, "finetune", variant, processes, rates, difference=max(differences))
    return failed


def train(
    options: argparse.Namespace,
    history: Path,
    method: str,
    processes: int,
    passes: int,
    setting: dict[str, str],
) -> bool:
    """Run ``cats finetune`` and keep its history."""
    rows = options.batch // (processes * passes)
    with tempfile.TemporaryDirectory() as folder:
        named = {
            "method": method,
            "text": f"{options.text}[:50%]",
            "eval-text": f"text={options.text}[50%:]",
            "eval-tokens": options.eval_tokens,
            "block": options.block,
            "dtype": "float32",
            "dropout": 0,
            "lr": 1e-4,
            "batch-size": rows,
            "accumulate": passes,
            "steps": options.train_steps,
            "eval-every": options.train_steps // 2,
            "save-every": 0,
            "output": f"{folder}/run",
        }
        if method == "cats":
            named["calibration-text"] = f"{options.text}[:50%]"
        arguments = [f"--{name}={value}" for name, value in named.items()]
        command = ["-m", "cats", "finetune", options.model, "--no-bf16", *arguments]
        done = launch(options, processes, *command, environment=setting)
        if done:
            shutil.copy(Path(folder) / "run" / "history.jsonl", history)
    return done


# ---- one model over two GPUs: the exact path


def split(options: argparse.Namespace) -> list[str]:
    failed = []
    for dtype in ("float32", "bfloat16"):
        if has_line(options, "split", f"{dtype}, cats.generate, two devices"):
            continue
        if not launch(options, 1, *worker(options, f"split-{dtype}")):
            failed.append(f"split, {dtype}")
    return failed


def split_worker(options: argparse.Namespace, dtype: torch.dtype) -> None:
    import cats
    from cats.benchmarks.shapes import random_model

    name = str(dtype).removeprefix("torch.")
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    torch.manual_seed(0)
    layers = options.exact_layers if dtype == torch.float32 else options.layers
    model: Any = random_model(options.shape, dtype, device, layers=layers)
    # a head that is tied to the embedding would repeat one token for ever
    model.config.tie_word_embeddings = False
    head = torch.randn_like(model.lm_head.weight) * model.config.hidden_size**-0.5
    model.lm_head.weight = torch.nn.Parameter(head)
    ids = torch.randint(model.config.vocab_size, (8, 512), device=device)
    prompt = ids[:1, :32]
    count = options.new_tokens

    def transformers_tokens() -> torch.Tensor:
        return model.generate(
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    def cats_tokens() -> torch.Tensor:
        return cats.generate(model, prompt, max_new_tokens=count, eos_token_id=[])

    def measure(variant: str, gpus: int, run: Callable[[], torch.Tensor], **more: Any) -> None:
        if not has_line(options, "split", f"{name}, {variant}"):
            rates = [rate_of(run, count) for _ in range(2)]
            add(options, "split", f"{name}, {variant}", gpus, rates, **more)

    def calibrate() -> cats.CatsConfig:
        return cats.calibrate(model, ids.split(4), target_sparsity=0.5)

    config = calibrate()
    cats.sparsify_(model, config)
    with torch.inference_mode():
        logits = model(ids[:1]).logits.float().cpu()
    expected = transformers_tokens().cpu()
    different = len(expected[0, prompt.shape[1] :].unique())
    say(f"  {name}: {different} different tokens among {count} new ones")
    measure("transformers", 1, transformers_tokens, same_as_one=True)
    if dtype != torch.float32:
        tokens = cats_tokens().cpu()
        if not (same := tokens.equal(expected)):
            report_difference(model, tokens, expected)
        measure("cats.generate", 1, cats_tokens, same_as_one=same)
    cats.densify_(model)
    cats.release(model)
    with tempfile.TemporaryDirectory() as folder:
        spread_(model, options.device, folder)
        again = calibrate()
        for mlp, tensors in config.tensors.items():
            for key, tensor in tensors.items():
                other = again.tensors[mlp][key]
                if not other.cpu().equal(tensor.cpu()):
                    raise SystemExit(f"two devices give {mlp} another {key}")
        say("  calibrated on two devices: the same thresholds, bit for bit")
        cats.sparsify_(model, again)
        refuse_stream(model, prompt)
        say(f"  cats.generate runs it with the engine {cats.Decoder(model).engine!r}")
        with torch.inference_mode():
            found = model(ids[:1]).logits.float().cpu()
        difference = float((found - logits).norm() / logits.norm())
        for variant, run in (
            ("transformers, two devices", transformers_tokens),
            ("cats.generate, two devices", cats_tokens),
        ):
            tokens = run().cpu()
            if not (same := tokens.equal(expected)):
                report_difference(model, tokens, expected)
            measure(variant, 2, run, same_as_one=same, difference=difference)
            if dtype == torch.float32 and not same:
                raise SystemExit(f"{variant}: other tokens than on one GPU in float32")


def spread_(model: Any, device: str, folder: str) -> None:
    """Place the first layers of a model on one device and the others on the next, in place."""
    from accelerate import dispatch_model, infer_auto_device_map

    if device == "cpu":
        layers = model.model.layers
        second = {f"model.layers.{i}": "disk" for i in range(len(layers) // 2, len(layers))}
        first = {f"model.layers.{i}": "cpu" for i in range(len(layers) // 2)}
        rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        places = dict.fromkeys(rest, "cpu") | first | second
        dispatch_model(model, places, main_device="cpu", offload_dir=folder)
        return
    half = sum(p.nbytes for p in model.parameters()) * 6 // 10
    layer = type(model.model.layers[0]).__name__
    limits = {0: half, 1: 2 * half}
    places = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=[layer])
    dispatch_model(model, places)
    devices = {p.device for p in model.parameters()}
    if len(devices) != 2:
        raise SystemExit(f"the model is not on two devices, but on {devices}")


def refuse_stream(model: Any, prompt: torch.Tensor) -> None:
    """The engine ``stream`` must refuse a model that is on two devices."""
    import cats

    try:
        cats.generate(model, prompt, max_new_tokens=2, engine="stream")
    except BackendError as error:
        say(f"  engine='stream': {error}")
    else:
        raise SystemExit("engine='stream' did not refuse a model on two devices")


def report_difference(model: Any, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Say where tokens ``[1, T]`` leave the expected ones, and how near the two logits were."""
    place = int((tokens != expected)[0].nonzero()[0])
    with torch.inference_mode():
        logits = model(expected[:, :place].to(model.device)).logits[0, -1].float().cpu()
    one, other = logits[expected[0, place]], logits[tokens[0, place]]
    say(
        f"  another token at {place}: its logit is {float(other):.4f}, that of the expected one "
        f"{float(one):.4f}, the largest {float(logits.max()):.4f}"
    )


def rate_of(run: Callable[[], torch.Tensor], count: int) -> float:
    """New tokens per second of one call; its result is on the host at its end."""
    start = time.perf_counter()
    run().cpu()
    return count / (time.perf_counter() - start)


# ---- calibration: the same thresholds, bit for bit


def calibrate(options: argparse.Namespace) -> list[str]:
    from safetensors.torch import load_file

    if has_line(options, "calibrate"):
        return []
    with tempfile.TemporaryDirectory() as folder:
        files = {n: Path(folder) / f"{n}.safetensors" for n in (1, 2)}
        rates = {}
        for processes, file in files.items():
            more = (f"--processes={processes}", f"--thresholds={file}")
            if not launch(options, processes, *worker(options, "count", *more)):
                return [f"calibrate, {processes} processes"]
            rates[processes] = json.loads(file.with_suffix(".json").read_text())
        one, two = map(load_file, files.values())
    same = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for processes, values in rates.items():
        add(options, "calibrate", "cats calibrate", processes, values, same_as_one=same)
    return [] if same else ["calibrate: other thresholds"]


def count(options: argparse.Namespace) -> None:
    """Tokens per second of the counting, without loading; the thresholds of the last round."""
    from cats import recipes
    from cats.cli.options import Dtype, load, process_device
    from cats.data import read_text, token_blocks
    from cats.processes import join_processes

    rank, processes = join_processes()
    if processes != options.processes:
        raise SystemExit(f"expected {options.processes} processes, got {processes}")
    device = process_device("cuda:0" if options.device == "cuda" and processes == 1 else "auto")
    model, tokenizer = load(options.model, dtype=Dtype.bfloat16, device=device, dense=True)
    blocks = token_blocks(tokenizer, read_text(options.text))
    rows = max(1, options.count_tokens // blocks.shape[1])
    blocks = blocks.repeat(-(-rows // len(blocks)), 1)[:rows]
    rates = []
    for _ in range(4):
        start = time.perf_counter()
        counted = recipes.count(model, blocks, batch_size=16)
        rates.append(blocks.numel() / (time.perf_counter() - start))
    if rank == 0:
        counted.config(0.5).save(options.thresholds)
        options.thresholds.with_suffix(".json").write_text(json.dumps(rates[1:]))


# ---- two models, one per GPU, at once


def apart(options: argparse.Namespace) -> list[str]:
    if options.device == "cpu":
        say("  left out: it needs two GPUs")
        return []
    if has_line(options, "apart", "GPU 1 beside the other"):
        return []
    return [] if launch(options, 1, *worker(options, "apart")) else ["apart"]


def apart_worker(options: argparse.Namespace) -> None:
    import cats
    from cats.benchmarks.shapes import random_model

    decoders, prompts = [], []
    for index in (0, 1):
        device = torch.device("cuda", index)
        model = random_model(options.shape, torch.bfloat16, device, layers=options.layers)
        decoders.append(cats.Decoder(model, engine="stream"))
        prompts.append(torch.arange(32, device=device)[None] + index)

    def rates(index: int, rounds: int) -> list[float]:
        """Tokens per second after the first token of each answer."""
        found = []
        for _ in range(rounds):
            times: list[float] = []
            decoders[index].generate(
                prompts[index],
                max_new_tokens=options.new_tokens,
                eos_token_id=[],
                callback=lambda _, times=times: times.append(time.perf_counter()),
            )
            found.append((options.new_tokens - 1) / (times[-1] - times[0]))
        return found

    alone = []
    for index in (0, 1):
        rates(index, 2)
        alone.append(rates(index, 7))
        add(options, "apart", f"GPU {index} alone", 1, alone[index])
    both: list[list[float]] = [[], []]

    def run(index: int) -> None:
        both[index] += rates(index, 9)[1:-1]

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        change = statistics.median(both[index]) / statistics.median(alone[index]) - 1
        add(options, "apart", f"GPU {index} beside the other", 2, both[index], difference=change)


STEPS = {"finetune": finetune, "split": split, "calibrate": calibrate, "apart": apart}
WORKERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "count": count,
    "split-float32": lambda options: split_worker(options, torch.float32),
    "split-bfloat16": lambda options: split_worker(options, torch.bfloat16),
    "apart": apart_worker,
}

if __name__ == "__main__":
    try:
        main()
    except CatsError as error:
        sys.exit(str(error))
