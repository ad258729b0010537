"""``cats reproduce``: the paper's recipe on one model, from calibration to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cats.cli import options
from cats.cli.running import Terminal, resumable
from cats.cli.task_options import check_tasks, parse_batch_size
from cats.errors import ConfigError


def reproduce(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder of the results; a stopped run continues from it.",
        ),
    ],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A folder, a Hugging Face id, or [b]smollm2[/b].")
    ] = "mistralai/Mistral-7B-v0.1",
    sparsity: Annotated[
        str, typer.Option(help="Targets of CATS, separated by commas.")
    ] = "0.5,0.7,0.9",
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Methods to compare with the dense model, of cats, relu, input, teal, neuron, "
            "two-stage and cascade.",
            show_default="cats,relu,input,teal",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Calibration text.", show_default="RefinedWeb, from the hub"
        ),
    ] = None,
    eval_text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="More text for perplexity, beside held-out calibration text; repeatable.",
        ),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        options.number(
            min=2,
            help="Use at most N tokens of each --eval-text, in whole blocks.",
            show_default="all",
        ),
    ] = None,
    samples: Annotated[int, options.number(min=1, help="Calibration blocks.")] = 500,
    length: Annotated[int, options.number(min=2, help="Tokens per block.")] = 1024,
    seed: options.Seed = 0,
    bos: options.Bos = None,
    tasks: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Zero-shot tasks, separated by commas; or none."),
    ] = "paper8",
    limit: Annotated[
        int | None,
        options.number(min=1, help="Questions per task.", show_default="all"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of the tasks' parquet files, as for cats evaluate."
        ),
    ] = None,
    speed: Annotated[bool, typer.Option(help="Time the MLP and whole tokens too.")] = True,
    batch_size: Annotated[
        str, typer.Option(metavar="N", help="Questions per forward pass, or auto.")
    ] = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run the paper's recipe on one model: quality and speed of each method, and a report.

    Example: [b]cats reproduce --model mistralai/Mistral-7B-v0.1 -o mistral[/b]

    The methods are dense, CATS, ReLU, and input thresholding, uniform and as TEAL allocates it.
    All but ReLU read as many bytes per token as each CATS target. Results that are in the
    folder already are not measured again.
    """
    from cats.data import read_text
    from cats.recipes.recipe import Recipe
    from cats.recipes.recipe_folder import has_results
    from cats.recipes.reproduction import METHODS, check_methods
    from cats.recipes.reproduction import reproduce as run
    from cats.recipes.text import REFINED_WEB

    targets = _targets(sparsity)
    chosen = [part.strip() for part in methods.split(",")] if methods is not None else METHODS
    check_methods(chosen)
    batch = parse_batch_size(batch_size)
    options.check_output(output / "report.html")
    options.check_tokens(eval_tokens, length, "--eval-tokens")
    # a wrong name is an error before the model is loaded
    calibration = None if text is None else read_text(text)
    evaluation = {path.name: read_text(path) for path in eval_text or []}
    names = [] if tasks == "none" else check_tasks(tasks, data_dir)
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, tokenizer = options.load(model, dtype=dtype, device=device, dense=True, hub=hub)
    recipe = Recipe(
        model=loaded,
        tokenizer=tokenizer,
        folder=output,
        name=model,
        targets=targets,
        samples=samples,
        length=length,
        seed=seed,
        bos=bos,
        source=REFINED_WEB if text is None else text.name,
        revision=revision,
        progress=Terminal(),
    )
    with resumable(output, has_results):
        page = run(
            recipe,
            text=calibration,
            eval_texts=evaluation,
            eval_tokens=eval_tokens,
            methods=chosen,
            tasks=names,
            limit=limit,
            batch_size=batch,
            data_dir=data_dir,
            speed=speed,
        )
    options.out.print(f"wrote {page}", markup=False)


def _targets(text: str) -> list[float]:
    from cats.config import check_target

    try:
        targets = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--sparsity: expected numbers separated by commas, got {text!r}"
        ) from error
    for target in targets:
        check_target(target)
    return targets
