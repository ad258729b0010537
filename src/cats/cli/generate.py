"""``cats generate``: continue a prompt."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from cats.cli import options


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    thresholds: options.Thresholds = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    chat: Annotated[
        bool, typer.Option(help="Wrap the prompt in the model's chat template, if it has one.")
    ] = True,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Continue a prompt, token by token.

    Example: [b]cats generate smollm2 "Why is the sky blue?" --thresholds cats50.safetensors[/b]
    """
    loaded, tokenizer = options.load(model, thresholds=thresholds, dtype=dtype, device=device)
    import torch
    from transformers import TextStreamer

    torch.manual_seed(seed)
    streamer = (
        None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    report = run(
        loaded, tokenizer, prompt, chat=chat, max_new_tokens=max_new_tokens,
        temperature=temperature, streamer=streamer,
    )  # fmt: skip
    if as_json:
        options.print_json({"model": model, "prompt": prompt, **report})
    else:
        options.err.print(
            f"{report['new_tokens']} tokens, {report['tokens_per_second']:.1f} tokens/s",
            style="dim",
        )


def run(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool = True,
    temperature: float = 0.0,
    streamer: Any = None,
) -> dict[str, Any]:
    """Generate, and time the tokens after the first, so that the prompt's pass is left out.

    Returns:
        ``text``, ``new_tokens``, and ``tokens_per_second`` of decoding (0 where one token came).
    """
    import torch
    from transformers import StoppingCriteriaList

    from cats.errors import DataError

    ids = encode(tokenizer, prompt, chat=chat).to(model.device)
    if ids.shape[1] == 0:
        raise DataError("the prompt has no tokens: give some text")
    times: list[float] = []

    def stamp(tokens: torch.Tensor, scores: Any) -> torch.Tensor:
        if tokens.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            top_k=None,
            top_p=None,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([stamp]),
            streamer=streamer,
        )
    new = output[0, ids.shape[1] :]
    seconds = times[-1] - times[0]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True).strip(),
        "new_tokens": len(new),
        "tokens_per_second": (len(times) - 1) / seconds if seconds > 0 else 0.0,
    }


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """Token ids ``[1, T]`` of a prompt, in the chat template where there is one."""
    if chat and tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]
