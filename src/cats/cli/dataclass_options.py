"""Options of a command made of the fields of a dataclass: names, types, defaults and help."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape

_UNSET: Any = object()
_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The options of one dataclass.

    Attributes:
        values: Name of each field to its value.
        given: Fields whose option the user typed.
    """

    values: dict[str, Any]
    given: frozenset[str]


def options_of(
    argument: str,
    cls: type,
    panels: Mapping[str | None, Sequence[str]],
    *,
    names: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    shown: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command one option for each field, instead of one parameter.

    Args:
        argument: Name of that parameter; it gets a :class:`Chosen`.
        cls: The dataclass. Its docstring says under ``Attributes:`` what each field is.
        panels: Sections of the help, None for the first one, to the fields in them.
        names: Options that are not named like their field, such as ``"--learning-rate,--lr"``.
        defaults: Other defaults than those of the dataclass.
        shown: What the help shows as default, where the default itself says little.
    """
    kinds = typing.get_type_hints(cls)
    fields = {name: panel for panel, members in panels.items() for name in members}
    options = [
        _parameter(
            cls,
            name,
            kinds[name],
            panel=panel,
            names=(names or {}).get(name),
            default=(defaults or {}).get(name, _UNSET),
            shown=(shown or {}).get(name),
        )
        for name, panel in fields.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        before = inspect.signature(command, eval_str=True).parameters
        # another decorator of the same command may have it already, and wants it too
        wants_context = _CONTEXT.name in before
        # the help shows options in the order of parameters: these stand where the one was
        parameters = [] if wants_context else [_CONTEXT]
        for name, parameter in before.items():
            at_its_place = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters += options if name == argument else at_its_place

        @functools.wraps(command)
        def wrapper(context: typer.Context, **values: Any) -> None:
            own = {name: _as_field(kinds[name], values.pop(name)) for name in fields}
            given = frozenset(name for name in fields if _is_given(context, name))
            values |= {"context": context} if wants_context else {}
            command(**values, **{argument: Chosen(own, given)})

        wrapper.__dict__["__signature__"] = inspect.Signature(parameters)
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


@functools.cache
def help_of(cls: type) -> dict[str, str]:
    """Name of each field to what the docstring says of it, in one line."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    text = text.partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


def option_name(field: str, names: Mapping[str, str]) -> str:
    """The option of a field as it is typed; the first, where it has several names."""
    return re.split("[,/]", names.get(field, "--" + field.replace("_", "-")))[0]


def _parameter(
    cls: type,
    name: str,
    kind: Any,
    *,
    panel: str | None,
    names: str | None,
    default: Any,
    shown: str | None,
) -> inspect.Parameter:
    """The parameter from which typer makes an option."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    # python -OO leaves no docstring
    words = help_of(cls).get(name, "")
    if typing.get_origin(kind) is tuple:
        # an option that is not given is None there
        kind, words = list[str] | None, f"{words} Repeatable."
    given = names.split(",") if names else []
    if kind is bool and not given:
        # without a name there would be --no-... as well
        given = [option_name(name, {})]
    more: dict[str, Any] = {} if shown is None else {"show_default": shown}
    if kind in (int, int | None):
        more["min"] = field.metadata.get("least")
    option = typer.Option(*given, help=escape(words), rich_help_panel=panel, **more)
    default = field.default if default is _UNSET else default
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, option],
        default=None if default == () else default,
    )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _as_field(kind: Any, value: Any) -> Any:
    return tuple(value or ()) if typing.get_origin(kind) is tuple else value
