"""What to generate: as transformers reads it from the call and from ``GenerationConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from transformers import GenerationConfig

from cats.decode.processors import DRAWING, PROCESSED, Processors
from cats.decode.sampling import Sampling
from cats.decode.values import flag, integer, integers, number, plain
from cats.errors import ConfigError

# What transformers takes where neither the call nor the model says anything.
_DEFAULTS: Mapping[str, Any] = {"do_sample": False, "top_k": 50}
_DEFAULT_NEW_TOKENS = 20
# Other kinds of generation, each with the values under which it is the usual one, beside None.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "return_dict_in_generate": (False,),
}
# The same, where only a call can ask for it.
_REFUSED_IN_CALL: Mapping[str, tuple[Any, ...]] = {
    "assistant_model": (),
    "custom_generate": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "synced_gpus": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
# Taken, since they do not change a token here.
_WITHOUT_EFFECT = frozenset({"bos_token_id", "early_stopping", "length_penalty", "use_cache"})
_SAMPLING = frozenset(field.name for field in fields(Sampling))
_KNOWN = _SAMPLING | frozenset(PROCESSED) | {
    "max_new_tokens", "max_length", "max_time", "eos_token_id", "pad_token_id", "stop_strings",
    "num_return_sequences", "seed", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Everything that decides about the tokens, but for the prompt.

    Attributes:
        sampling: How a token is chosen; all neutral but ``do_sample`` where there are processors.
        seed: Of the draws; None takes the next number of torch's generator.
        max_new_tokens: New tokens a row, at most.
        eos_token_ids: Tokens that end a row; it is filled up with ``pad_token_id``.
        pad_token_id: As said.
        stop_strings: Texts that end a row where the new text contains one.
        num_return_sequences: Continuations of each prompt.
        max_time: Seconds after which all rows end; None for no limit.
        stopping_criteria: Those of transformers that end rows.
        processors: Those of transformers that change the scores; such a step cannot be captured.
    """

    sampling: Sampling
    seed: int | None
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    stop_strings: tuple[str, ...]
    num_return_sequences: int = 1
    max_time: float | None = None
    stopping_criteria: tuple[Any, ...] = ()
    processors: Processors | None = None


def _seed(value: int) -> int:
    if not 0 <= value < 2**63:
        raise ConfigError(f"seed: expected a number from 0 to 2**63 - 1, got {value}")
    return value


class _Settings:
    """Values by name: of the call, its ``generation_config``, the model's, and the defaults."""

    def __init__(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        self._given = given
        config: Any = getattr(model, "generation_config", None)
        own = given.get("generation_config")
        if own is not None and not isinstance(own, GenerationConfig):
            raise ConfigError(
                f"generation_config: expected transformers' GenerationConfig, got "
                f"{type(own).__name__}: give its options by name instead"
            )
        self._configs = [c for c in (given.get("generation_config"), config) if c is not None]

    def __call__(self, name: str) -> Any:
        # as in transformers, None counts in a call, and is no value in a config
        if name in self._given:
            return self._given[name]
        for config in self._configs:
            if (value := getattr(config, name, None)) is not None:
                return value
        return _DEFAULTS.get(name)


def resolve(model: nn.Module, prompt_length: int, given: Mapping[str, Any]) -> Options:
    """The options of one call, as transformers would resolve them.

    Args:
        model: Its ``generation_config`` says what the call leaves open.
        prompt_length: Tokens of a row, its padding included.
        given: Options of the call.

    Raises:
        ConfigError: If an option is unknown, out of range, or of a kind of generation that this
            loop does not do (beams, for one).
    """
    _check_names(given)
    value = _Settings(model, given)
    _refuse(value, given)
    sampling = _sampling(value, given)
    eos, (pad, _) = integers("eos_token_id", value("eos_token_id")), padding(model, given)
    count = _new_tokens(model, value, prompt_length)
    sequences = value("num_return_sequences")
    sequences = 1 if sequences is None else integer("num_return_sequences", sequences)
    if sequences < 1 or (sequences > 1 and not sampling.do_sample):
        raise ConfigError(
            f"num_return_sequences={sequences}: expected at least 1, and more than 1 only with "
            "do_sample=True"
        )
    seed, time = value("seed"), value("max_time")
    processors = _processors(model, value, given, sampling, eos, prompt_length, count)
    return Options(
        sampling=sampling if processors is None else Sampling(do_sample=sampling.do_sample),
        seed=None if seed is None else _seed(integer("seed", seed)),
        max_new_tokens=count,
        eos_token_ids=eos,
        pad_token_id=pad,
        stop_strings=_stop_strings(value("stop_strings")),
        num_return_sequences=sequences,
        max_time=None if time is None else number("max_time", time),
        stopping_criteria=_several("stopping_criteria", given.get("stopping_criteria")),
        processors=processors,
    )


def padding(model: nn.Module, given: Mapping[str, Any]) -> tuple[int, bool]:
    """The token that fills up rows, and whether ids that hold it are padded with it.

    As in transformers, it marks padding where it is set and ends no row.

    Raises:
        ConfigError: If the call gives a token that the model does not have.
    """
    value = _Settings(model, given)
    eos, pad = integers("eos_token_id", value("eos_token_id")), value("pad_token_id")
    config: Any = model.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    if pad is not None:
        pad = integer("pad_token_id", pad)
        if not 0 <= pad < vocabulary:
            if given.get("pad_token_id") is not None:
                raise ConfigError(
                    f"expected pad_token_id from 0 to {vocabulary - 1}, the model's vocabulary, "
                    f"got {pad}"
                )
            # older checkpoints say -1 for none
            pad = None
    if pad is None:
        return (eos[0] if eos else 0), False
    return pad, pad not in eos


def _check_names(given: Mapping[str, Any]) -> None:
    taken = _KNOWN | set(_REFUSED) | set(_REFUSED_IN_CALL) | _WITHOUT_EFFECT
    if unknown := sorted(set(given) - taken):
        raise ConfigError(
            f"cats.generate has no option {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(_KNOWN))}"
        )


def _refuse(value: _Settings, given: Mapping[str, Any]) -> None:
    for name, neutral in (*_REFUSED.items(), *_REFUSED_IN_CALL.items()):
        setting = value(name) if name in _REFUSED else given.get(name)
        if _is_set(setting, neutral):
            where = "" if name in given else "the generation_config sets "
            shown = repr(setting) if len(repr(setting)) < 80 else type(setting).__name__
            raise ConfigError(
                f"{where}{name}={shown}, which the decode loop does not do: use model.generate, "
                "or leave it out"
            )


def _sampling(value: _Settings, given: Mapping[str, Any]) -> Sampling:
    numbers: dict[str, Any] = {
        name: (integer if name == "top_k" else number)(name, setting)
        for name in _SAMPLING - {"do_sample"}
        if (setting := value(name)) is not None
    }
    if flag("do_sample", value("do_sample")):
        return Sampling(do_sample=True, **numbers)
    # wrong ones are refused all the same, but for the temperature 0 that means greedy decoding
    Sampling(**{n: v for n, v in numbers.items() if n in given and n != "temperature"})
    # as in transformers, which ignores them for greedy decoding
    return Sampling(**{n: v for n, v in numbers.items() if n == "repetition_penalty"})


def _new_tokens(model: nn.Module, value: _Settings, prompt_length: int) -> int:
    # as in transformers, it counts before max_length, wherever the two are from
    count, length = value("max_new_tokens"), value("max_length")
    if count is not None:
        count = integer("max_new_tokens", count)
    elif length is not None:
        count = integer("max_length", length) - prompt_length
    else:
        config: Any = model.config
        context = getattr(config, "max_position_embeddings", None)
        count = _DEFAULT_NEW_TOKENS
        if context is not None and context > 0:
            count = min(count, int(context) - prompt_length)
    if count < 1:
        raise ConfigError(
            f"nothing to generate: the prompt has {prompt_length} tokens, which leaves {count} "
            "new ones; raise max_new_tokens or max_length"
        )
    return count


def _processors(
    model: nn.Module,
    value: _Settings,
    given: Mapping[str, Any],
    sampling: Sampling,
    eos: tuple[int, ...],
    prompt_length: int,
    count: int,
) -> Processors | None:
    names = [n for n in PROCESSED if n not in DRAWING or sampling.do_sample]
    settings = {n: plain(v) for n in names if _is_set(v := value(n), PROCESSED[n])}
    processors = _several("logits_processor", given.get("logits_processor"))
    allowed = given.get("prefix_allowed_tokens_fn")
    if not settings and not processors and allowed is None:
        return None
    if "min_new_tokens" in settings:
        settings["min_new_tokens"] = integer("min_new_tokens", settings["min_new_tokens"])
    chosen = {n: getattr(sampling, n) for n in ("do_sample", "repetition_penalty")}
    if sampling.do_sample:
        chosen |= {n: getattr(sampling, n) for n in _SAMPLING}
    settings |= chosen | {"max_length": prompt_length + count, "num_beams": 1}
    return Processors(
        model, settings, eos_token_ids=eos, logits_processor=processors,
        prefix_allowed_tokens_fn=allowed, sequences=value("num_return_sequences") or 1,
    )  # fmt: skip


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple | set) or not all(isinstance(s, str) and s for s in stop):
        raise ConfigError(f"expected texts as stop_strings, none of them empty, got {stop!r}")
    return tuple(stop)


def _several(name: str, given: Any) -> tuple[Any, ...]:
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise ConfigError(f"expected a list as {name}, got {type(given).__name__}")
    return tuple(given)


def _is_set(setting: Any, neutral: tuple[Any, ...]) -> bool:
    setting = plain(setting)
    return setting is not None and not (
        isinstance(setting, bool | int | float) and setting in neutral
    )
