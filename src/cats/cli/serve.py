"""``cats serve``: an OpenAI-compatible server."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cats.cli import options

if TYPE_CHECKING:
    from torch import nn

    from cats.protocols import Tokenizer
    from cats.serving.models import Models
    from cats.serving.settings import Settings

# As many as tell thresholds well; more take longer than a server should to start.
_CALIBRATION_TOKENS = 20_480

access_option = partial(typer.Option, rich_help_panel="Access")
limit_option = partial(typer.Option, rich_help_panel="Limits")


def serve(
    model: options.Model,
    thresholds: options.Thresholds = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Instead of --thresholds: find them at the start, so that this share of neurons "
            "is dropped.",
        ),
    ] = None,
    text: options.Texts = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Adapter of [b]cats finetune[/b] on MODEL: run/adapter."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Id of the model in requests.", show_default="MODEL as typed"),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Chat template (Jinja) instead of the model's own."),
    ] = None,
    host: Annotated[
        str,
        access_option(help="Address to listen on; 0.0.0.0 lets other machines in."),
    ] = "127.0.0.1",
    port: Annotated[int, access_option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        access_option(
            metavar="KEY",
            envvar="CATS_API_KEY",
            help="Requests need this key; repeatable, in the variable by spaces.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        access_option(
            metavar="NAME",
            help="Further name of a server on this machine only, such as a proxy's; repeatable.",
        ),
    ] = None,
    rows: Annotated[int, limit_option(min=1, help="Answers that decode together.")] = 16,
    context: Annotated[
        int | None,
        limit_option(
            min=2,
            help="Tokens of the longest prompt and answer.",
            show_default="the model's, at most 2048",
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        limit_option(
            min=1,
            help="Tokens of the cache, all allocated at the start.",
            show_default="rows x context",
        ),
    ] = None,
    dense_rows: Annotated[
        int,
        limit_option(
            min=0,
            help="Answers that decode together as [b]NAME:dense[/b], a sparse model without its "
            "thresholds; 0 leaves it out.",
        ),
    ] = 2,
    queue: Annotated[
        int, limit_option(min=0, help="Answers that wait for a place; more get status 429.")
    ] = 64,
    max_body: Annotated[
        int, limit_option(min=1, metavar="BYTES", help="Size of the largest request.")
    ] = 4 * 2**20,
    read_timeout: Annotated[
        float, limit_option(metavar="SECONDS", help="For the headers, and for the body.")
    ] = 30.0,
    request_timeout: Annotated[
        float, limit_option(metavar="SECONDS", help="For an answer, with its time in the queue.")
    ] = 600.0,
    shutdown_timeout: Annotated[
        float, limit_option(metavar="SECONDS", help="For running answers once the server stops.")
    ] = 60.0,
    log_json: Annotated[
        bool, typer.Option(help="Log requests as JSON, one object a line.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            help="modules, or [b]stream[/b]: kernels for rows on a GPU, tried in an emulator only."
        ),
    ] = "modules",
    fuse: Annotated[bool, typer.Option(help="Run a sparse model's MLPs as one operator.")] = True,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
) -> None:
    """Serve a model to OpenAI clients, with a chat page.

    Example: [b]cats serve smollm2 --sparsity 0.5[/b]
    """
    from cats.config import check_target
    from cats.data import read_text
    from cats.errors import ConfigError

    try:
        from cats.serving.models import serve_models
        from cats.serving.run import run
        from cats.serving.settings import Settings
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is missing: pip install 'cats-llm[serve]' brings what the server needs"
        ) from error

    settings = Settings(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        allowed_hosts=tuple(allowed_host or ()),
        queue=queue,
        max_body=max_body,
        read_timeout=read_timeout,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        log_json=log_json,
    )
    if adapter is not None and (thresholds is not None or sparsity is not None):
        raise ConfigError(
            "an adapter brings its own thresholds: leave --thresholds and --sparsity out"
        )
    if sparsity is None and text:
        raise ConfigError("--text is what --sparsity finds thresholds on: give --sparsity too")
    if sparsity is not None:
        if thresholds is not None:
            raise ConfigError("give --thresholds or --sparsity, not both")
        check_target(sparsity)
    template = None if chat_template is None else read_text(chat_template)
    loaded, tokenizer = options.load(
        model,
        thresholds=thresholds,
        adapter=adapter,
        dtype=dtype,
        device=device,
        threads=threads,
        hub=options.hub(revision, subfolder, trust_remote_code),
    )
    if template is not None:
        tokenizer.chat_template = template
    if sparsity is not None:
        _make_sparse_(loaded, tokenizer, sparsity, text)
    if fuse:
        options.fuse_where_possible(loaded)
    served_name = name or model.rstrip("/")
    with options.err.status("allocating the cache, checking the model ..."):
        models = serve_models(
            loaded,
            tokenizer,
            name=served_name,
            rows=rows,
            context=context,
            cache_tokens=cache_tokens,
            engine=engine,
            dense_rows=dense_rows,
            queue=queue,
        )
    run(models, settings, on_start=partial(_tell, models, settings))


def _make_sparse_(
    model: nn.Module, tokenizer: Tokenizer, sparsity: float, text: list[Path] | None
) -> None:
    from cats.apply import sparsify_
    from cats.calibration import calibrate
    from cats.data import token_blocks

    texts = options.texts_or_sample(text)
    blocks = token_blocks(tokenizer, texts, limit=_CALIBRATION_TOKENS // 512)
    batches = options.progress(blocks.split(4), "finding thresholds")
    sparsify_(model, calibrate(model, batches, target_sparsity=sparsity))
    _print(
        f"thresholds of {blocks.numel():,} tokens of {options.describe_texts(text)}; what they "
        "cost in quality was not measured: cats calibrate does that, and keeps them in a file"
    )


def _tell(models: Models, settings: Settings, address: str) -> None:
    """Say on standard error what is served, and where."""
    for model in models:
        entry = model.describe()["cats"]
        kind = "sparse" if entry["sparse"] else "dense"
        _print(
            f"{model.id}: {kind}, context {entry['context']} tokens, {entry['rows']} answers at a "
            "time"
        )
        if model.sessions.refusal is not None:
            _print(f"its answers run one after the other: {model.sessions.refusal}")
    if not settings.is_local:
        reach = "everybody who reaches this address may use the model"
        keys = "only requests with the key are answered" if settings.api_keys else reach
        _print(
            f"warning: listening on {settings.host}, not on this machine only; {keys}, without "
            "encryption: put a proxy with TLS before it"
        )
    _print(f"chat at {address}/, OpenAI clients at {address}/v1")


def _print(text: str) -> None:
    options.err.print(text, markup=False, highlight=False, soft_wrap=True)
