"""``cats families``: what works for which family of transformers, tried on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cats.cli import options


def families(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FAMILY",
            help="Names of model types, such as [b]mixtral[/b].",
            show_default="all",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the page as Markdown."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fail unless this file is the page as it is now."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Try every causal family of transformers on a tiny model with random weights.

    Example: [b]cats families mixtral glm4[/b]

    All of them take some minutes. A sparse model must compute what the plain one computes with
    masked activations; otherwise the command fails.
    """
    from dataclasses import asdict

    from cats.errors import ConfigError
    from cats.families import check_family, page
    from cats.families.tiny import model_types

    options.quiet()
    known = model_types()
    if unknown := sorted(set(names or ()) - set(known)):
        raise ConfigError(f"transformers has no causal family {', '.join(unknown)}")
    if names and (output or check):
        raise ConfigError("the page is about all families: leave the names out")
    found = []
    for name in names or known:
        family = check_family(name)
        found.append(family)
        options.err.print(f"{name}: {family.sparsify}", markup=False, highlight=False)
    if as_json:
        options.print_json([asdict(family) for family in found])
    elif names:
        from cats.cli.tables import field_table

        for family in found:
            values = {k: v for k, v in asdict(family).items() if k != "model_type" and v != ""}
            options.out.print(field_table(family.model_type, values).rich())
    if output is not None:
        output.write_text(page(found), encoding="utf-8")
        options.out.print(f"wrote {output}", markup=False)
    if check is not None and (not check.is_file() or check.read_text("utf-8") != page(found)):
        raise ConfigError(
            f"{check} is not the page that this release of cats and transformers gives: write it "
            f"with cats families -o {check}, and look at what changed"
        )
