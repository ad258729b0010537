"""What to generate: the model's ``GenerationConfig``, and what the caller says instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from cats.decode.sampling import Sampling
from cats.errors import ConfigError

_DEFAULT_NEW_TOKENS = 20  # that of transformers
# Settings of a GenerationConfig that change tokens and that this loop does not know, each with the
# values under which it changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "prompt_lookup_num_tokens": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Everything that decides about the tokens, but for the prompt.

    Attributes:
        sampling: How a token is chosen.
        seed: Of the draws; None takes the next number of torch's generator.
        max_new_tokens: New tokens a row, at most.
        eos_token_ids: Tokens that end a row; it is filled up with ``pad_token_id``.
        pad_token_id: As said.
        stop_strings: Texts that end a row where the new text contains one.
    """

    sampling: Sampling
    seed: int | None
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    stop_strings: tuple[str, ...]


def resolve(model: nn.Module, prompt_length: int, given: Mapping[str, Any]) -> Options:
    """The options of one call: what is given, else what the model's ``generation_config`` says.

    Raises:
        ConfigError: If an option is unknown, out of range, or of a kind of generation that this
            loop does not do (beams, for one).
    """
    config = getattr(model, "generation_config", None)
    sampling_names = {field.name for field in fields(Sampling)}
    known = {
        "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "stop_strings", "seed",
        *sampling_names,
    }  # fmt: skip
    if unknown := sorted(set(given) - known):
        raise ConfigError(
            f"cats.generate has no option {', '.join(unknown)}; it knows {', '.join(sorted(known))}"
        )
    for name, neutral in _NEUTRAL.items():
        setting = getattr(config, name, None)
        if setting is not None and setting not in neutral:
            raise ConfigError(
                f"the model's generation_config sets {name}={setting!r}, which the decode loop "
                "does not do: use model.generate, or clear it"
            )

    def value(name: str) -> Any:
        return given[name] if name in given else getattr(config, name, None)

    sampling = {name: v for name in sampling_names if (v := value(name)) is not None}
    if not sampling.get("do_sample"):
        # wrong ones are refused all the same, but for the temperature 0 that means greedy decoding
        Sampling(**{n: v for n, v in sampling.items() if n in given and n != "temperature"})
        # as in transformers, which ignores them for greedy decoding
        sampling = {n: v for n, v in sampling.items() if n in ("do_sample", "repetition_penalty")}
    eos = value("eos_token_id")
    eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    pad = value("pad_token_id")
    if pad is None:
        pad = eos[0] if eos else 0
    stop = value("stop_strings")
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not s for s in stop):
        raise ConfigError("a stop string must not be empty")
    return Options(
        sampling=Sampling(**sampling),
        seed=value("seed"),
        max_new_tokens=_new_tokens(config, prompt_length, given),
        eos_token_ids=eos,
        pad_token_id=int(pad),
        stop_strings=stop,
    )


def _new_tokens(config: Any, prompt_length: int, given: Mapping[str, Any]) -> int:
    for source in (given, vars(config) if config is not None else {}):
        if source.get("max_new_tokens") is not None:
            count = int(source["max_new_tokens"])
            break
        if source.get("max_length") is not None:
            count = int(source["max_length"]) - prompt_length
            break
    else:
        count = _DEFAULT_NEW_TOKENS
    if count < 1:
        raise ConfigError(
            f"nothing to generate: the prompt has {prompt_length} tokens, which leaves {count} "
            "new ones; raise max_new_tokens"
        )
    return count
