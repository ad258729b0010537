"""Options of a call, read as transformers reads them: from the call and ``GenerationConfig``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import Tensor, nn
from transformers import GenerationConfig

from cats.decode.processors import DRAWING, PROCESSED, Processors
from cats.decode.sampling import Sampling
from cats.decode.values import flag, integer, integers, number, plain
from cats.errors import ConfigError
from cats.protocols import CausalModel

# What transformers takes where neither the call nor the model says anything.
_DEFAULTS: Mapping[str, Any] = {"do_sample": False, "top_k": 50}
_DEFAULT_NEW_TOKENS = 20
# Options of other kinds of generation, each with the values that leave the kind as it is. None
# does so for each.
_REFUSED: Mapping[str, tuple[float, ...]] = {
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
# The same, for options that only a call can set.
_REFUSED_IN_CALL: Mapping[str, tuple[float, ...]] = {
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
# Accepted, since they do not change a token here.
_WITHOUT_EFFECT = frozenset({"bos_token_id", "early_stopping", "length_penalty", "use_cache"})
_SAMPLING = frozenset(field.name for field in fields(Sampling))
_LENGTHS = {"max_new_tokens", "max_length", "max_time"}
_ENDS = {"eos_token_id", "pad_token_id", "stop_strings", "stopping_criteria"}
_OBJECTS = {"generation_config", "logits_processor", "prefix_allowed_tokens_fn"}
_KNOWN = {*_SAMPLING, *PROCESSED, *_LENGTHS, *_ENDS, *_OBJECTS, "num_return_sequences", "seed"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Everything that decides about the tokens, except the prompt.

    Attributes:
        sampling: How a token is chosen. With ``processors``, which then do the work, only
            ``do_sample`` is set.
        seed: Of the draws; None takes the next number of torch's generator.
        max_new_tokens: New tokens per row, at most.
        eos_token_ids: Tokens that end a row.
        pad_token_id: Fills up rows that have ended.
        stop_strings: A row ends where its new text contains one of these.
        num_return_sequences: Continuations per prompt.
        max_time: Seconds after which all rows end; None for no limit.
        stopping_criteria: Functions of transformers that end rows.
        processors: What changes the scores as transformers does; such a step cannot be captured.
    """

    sampling: Sampling
    seed: int | None
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    stop_strings: tuple[str, ...]
    num_return_sequences: int = 1
    max_time: float | None = None
    stopping_criteria: tuple[Callable[..., Tensor], ...] = ()
    processors: Processors | None = None


class _Settings:
    """Values by name: from the call, its ``generation_config``, the model's, and the defaults.

    Attributes:
        call: The options of the call.
    """

    def __init__(self, model: nn.Module, call: Mapping[str, Any]) -> None:
        """
        Raises:
            ConfigError: If ``generation_config`` is no such object.
        """
        self.call = call
        config = call.get("generation_config")
        if config is not None and not isinstance(config, GenerationConfig):
            raise ConfigError(
                f"generation_config: expected transformers' GenerationConfig, got "
                f"{type(config).__name__}: give its options by name instead"
            )
        self._configs = [config, getattr(model, "generation_config", None)]

    def __call__(self, name: str) -> Any:
        # as in transformers, None counts in a call, and is no value in a config
        if name in self.call:
            return self.call[name]
        for config in self._configs:
            if (value := getattr(config, name, None)) is not None:
                return value
        return _DEFAULTS.get(name)


def resolve(model: nn.Module, prompt_length: int, call: Mapping[str, Any]) -> Options:
    """The options of one call, as transformers would resolve them.

    Args:
        model: Its ``generation_config`` says what the call leaves open.
        prompt_length: Tokens per row, padding included.
        call: Options of the call.

    Raises:
        ConfigError: If an option is unknown, out of range, or of a kind of generation that this
            loop does not do (beams, for example).
    """
    _check_names(call)
    setting = _Settings(model, call)
    _refuse_other_kinds(setting)
    sampling = _sampling(setting)
    eos = integers("eos_token_id", setting("eos_token_id"))
    pad, _ = padding(model, call)
    max_new_tokens = _max_new_tokens(model, setting, prompt_length)
    sequences = _sequences(setting, sampling)
    processors = _processors(model, setting, sampling, eos, prompt_length + max_new_tokens)
    max_time = setting("max_time")
    return Options(
        sampling=sampling if processors is None else Sampling(do_sample=sampling.do_sample),
        seed=_seed(setting),
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos,
        pad_token_id=pad,
        stop_strings=_stop_strings(setting("stop_strings")),
        num_return_sequences=sequences,
        max_time=None if max_time is None else number("max_time", max_time),
        stopping_criteria=_objects("stopping_criteria", call),
        processors=processors,
    )


def padding(model: nn.Module, call: Mapping[str, Any]) -> tuple[int, bool]:
    """The token that fills up rows, and whether it marks padding in ids without a mask.

    As in transformers, it marks padding where it is set and ends no row.

    Raises:
        ConfigError: If the call names a token that the model does not have.
    """
    setting = _Settings(model, call)
    eos, pad = integers("eos_token_id", setting("eos_token_id")), setting("pad_token_id")
    vocabulary = cast(CausalModel, model).config.get_text_config(decoder=True).vocab_size
    if pad is not None:
        pad = integer("pad_token_id", pad)
        if not 0 <= pad < vocabulary:
            if call.get("pad_token_id") is not None:
                raise ConfigError(
                    f"expected pad_token_id from 0 to {vocabulary - 1}, the model's vocabulary, "
                    f"got {pad}"
                )
            # older checkpoints say -1 for none
            pad = None
    if pad is None:
        return (eos[0] if eos else 0), False
    return pad, pad not in eos


def _check_names(call: Mapping[str, Any]) -> None:
    accepted = _KNOWN | set(_REFUSED) | set(_REFUSED_IN_CALL) | _WITHOUT_EFFECT
    if unknown := sorted(set(call) - accepted):
        raise ConfigError(
            f"cats.generate has no option {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(_KNOWN))}"
        )


def _refuse_other_kinds(setting: _Settings) -> None:
    for name, neutral in (*_REFUSED.items(), *_REFUSED_IN_CALL.items()):
        value = setting(name) if name in _REFUSED else setting.call.get(name)
        if _is_set(value, neutral):
            where = "" if name in setting.call else "the generation_config sets "
            shown = repr(value) if len(repr(value)) < 80 else type(value).__name__
            raise ConfigError(
                f"{where}{name}={shown}, which the decode loop does not do: use model.generate, "
                "or leave it out"
            )


def _sampling(setting: _Settings) -> Sampling:
    numbers: dict[str, Any] = {
        name: (integer if name == "top_k" else number)(name, value)
        for name in _SAMPLING - {"do_sample"}
        if (value := setting(name)) is not None
    }
    if flag("do_sample", setting("do_sample")):
        return Sampling(do_sample=True, **numbers)
    # Sampling checks those of the call; the temperature 0 means greedy decoding, so it is left out
    Sampling(**{n: v for n, v in numbers.items() if n in setting.call and n != "temperature"})
    # as in transformers, the others have no effect on greedy decoding
    return Sampling(**{n: v for n, v in numbers.items() if n == "repetition_penalty"})


def _max_new_tokens(model: nn.Module, setting: _Settings, prompt_length: int) -> int:
    # as in transformers, max_new_tokens counts before max_length, even if a config sets it
    count, length = setting("max_new_tokens"), setting("max_length")
    if count is not None:
        count = integer("max_new_tokens", count)
    elif length is not None:
        count = integer("max_length", length) - prompt_length
    else:
        context = getattr(model.config, "max_position_embeddings", None)
        count = _DEFAULT_NEW_TOKENS
        if context is not None and context > 0:
            count = min(count, int(context) - prompt_length)
    if count < 1:
        raise ConfigError(
            f"nothing to generate: the prompt has {prompt_length} tokens, which leaves {count} "
            "new ones; raise max_new_tokens or max_length"
        )
    return count


def _sequences(setting: _Settings, sampling: Sampling) -> int:
    value = setting("num_return_sequences")
    count = 1 if value is None else integer("num_return_sequences", value)
    if count < 1 or (count > 1 and not sampling.do_sample):
        raise ConfigError(
            f"num_return_sequences={count}: expected at least 1, and more than 1 only with "
            "do_sample=True"
        )
    return count


def _seed(setting: _Settings) -> int | None:
    value = setting("seed")
    seed = None if value is None else integer("seed", value)
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"seed: expected a number from 0 to 2**63 - 1, got {seed}")
    return seed


def _processors(
    model: nn.Module,
    setting: _Settings,
    sampling: Sampling,
    eos_token_ids: tuple[int, ...],
    max_length: int,
) -> Processors | None:
    names = [n for n in PROCESSED if n not in DRAWING or sampling.do_sample]
    settings = {n: plain(v) for n in names if _is_set(v := setting(n), PROCESSED[n])}
    processors = _objects("logits_processor", setting.call)
    allowed = setting.call.get("prefix_allowed_tokens_fn")
    if not settings and not processors and allowed is None:
        return None
    if "min_new_tokens" in settings:
        settings["min_new_tokens"] = integer("min_new_tokens", settings["min_new_tokens"])
    names_of_sampling = _SAMPLING if sampling.do_sample else {"do_sample", "repetition_penalty"}
    settings |= {name: getattr(sampling, name) for name in names_of_sampling}
    settings |= {"max_length": max_length, "num_beams": 1}
    return Processors(
        model,
        settings,
        eos_token_ids=eos_token_ids,
        logits_processor=processors,
        prefix_allowed_tokens_fn=allowed,
        sequences=setting("num_return_sequences") or 1,
    )


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else () if value is None else value
    if not isinstance(strings, list | tuple | set) or not all(
        isinstance(string, str) and string for string in strings
    ):
        raise ConfigError(f"expected texts as stop_strings, none of them empty, got {value!r}")
    return tuple(strings)


def _objects(name: str, call: Mapping[str, Any]) -> tuple[Any, ...]:
    """The list of objects that the call gives under this name; none where it gives none."""
    objects = call.get(name)
    if objects is None:
        return ()
    if not isinstance(objects, list | tuple):
        raise ConfigError(f"expected a list as {name}, got {type(objects).__name__}")
    return tuple(objects)


def _is_set(value: object, neutral: tuple[float, ...]) -> bool:
    """Whether a value asks for something: it is neither None nor a neutral number."""
    value = plain(value)
    return value is not None and not (isinstance(value, bool | int | float) and value in neutral)
