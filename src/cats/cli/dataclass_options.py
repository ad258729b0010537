"""Make the options of a command from the fields of a dataclass: names, types, defaults, help."""

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

_UNSET = object()
_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The options of one dataclass.

    Attributes:
        values: Name of each field to its value.
        typed: Fields whose option the user typed.
    """

    values: dict[str, Any]
    typed: frozenset[str]


def options_of(
    argument: str,
    cls: type,
    panels: Mapping[str | None, Sequence[str]],
    *,
    names: Mapping[str, str] | None = None,
    defaults: Mapping[str, object] | None = None,
    shown: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that replaces one parameter of a command by one option per field.

    Args:
        argument: Name of the parameter; the command gets a :class:`Chosen` for it.
        cls: The dataclass. Its docstring describes each field under ``Attributes:``.
        panels: Section of the help, None for the first one, to the fields in it.
        names: Field to the names of its option, such as ``"--learning-rate,--lr"``.
        defaults: Field to another default than that of the dataclass.
        shown: Field to the default that the help shows, where the value itself says little.
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
        # another decorator of the same command may have added the context already
        wants_context = _CONTEXT.name in before
        # the help shows options in the order of the parameters
        parameters = [] if wants_context else [_CONTEXT]
        for name, parameter in before.items():
            unchanged = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters += options if name == argument else unchanged

        @functools.wraps(command)
        def wrapper(context: typer.Context, **values: Any) -> None:
            own = {name: _as_field(kinds[name], values.pop(name)) for name in fields}
            typed = frozenset(name for name in fields if _is_typed(context, name))
            values |= {"context": context} if wants_context else {}
            command(**values, **{argument: Chosen(own, typed)})

        wrapper.__dict__["__signature__"] = inspect.Signature(parameters)
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


@functools.cache
def help_of(cls: type) -> dict[str, str]:
    """Name of each field to its description in the docstring, in one line."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    text = text.partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


def option_name(field: str, names: Mapping[str, str]) -> str:
    """The name of a field's option; the first name if there are several."""
    return re.split("[,/]", names.get(field, "--" + field.replace("_", "-")))[0]


def _parameter(
    cls: type,
    name: str,
    kind: object,
    *,
    panel: str | None,
    names: str | None,
    default: object,
    shown: str | None,
) -> inspect.Parameter:
    """The parameter from which typer makes an option."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    # python -OO leaves no docstring
    words = help_of(cls).get(name, "")
    if typing.get_origin(kind) is tuple:
        # typer passes None for a list option that is not typed
        kind, words = list[str] | None, f"{words} Repeatable."
    option_names = names.split(",") if names else []
    if kind is bool and not option_names:
        # without a name there would be --no-... as well
        option_names = [option_name(name, {})]
    arguments: dict[str, Any] = {} if shown is None else {"show_default": shown}
    if kind in (int, int | None):
        arguments |= {"min": field.metadata.get("least"), "metavar": "N"}
    elif kind == list[str] | None:
        arguments["metavar"] = "NAME"
    option = typer.Option(*option_names, help=escape(words), rich_help_panel=panel, **arguments)
    default = field.default if default is _UNSET else default
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, option],
        default=None if default == () else default,
    )


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _as_field(kind: object, value: Any) -> object:
    return tuple(value or ()) if typing.get_origin(kind) is tuple else value
