"""The list of self-supervised methods in docs/methods.md, from the methods' own docstrings and defaults."""

import inspect
import re
import sys
from dataclasses import fields

from noisyssl.methods import METHODS

REGION = re.compile(r"(<!-- methods -->\n).*?(<!-- end -->)", re.DOTALL)


def rewrite(text: str) -> str:
    """`text` with its region `<!-- methods -->` filled from the methods."""
    return REGION.sub(lambda m: m[1] + listing() + m[2], text)


def listing() -> str:
    """Markdown: a heading per family, a paragraph per method."""
    families: dict[str, list[str]] = {}
    for name, kind in METHODS.items():
        families.setdefault(kind.family, []).append(paragraph(name))
    return "\n".join(f"### {family.capitalize()}\n\n" + "\n".join(told) for family, told in families.items())


def paragraph(name: str) -> str:
    """What a method's file says of itself."""
    kind = METHODS[name]
    idea, paper, use = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "").split("\n\n")
    settings = ", ".join(f"{field.name} = {field.default}" for field in fields(kind.Config))
    title, _, rest = _line(idea).partition(": ")
    return "\n".join(
        (
            f"**{title}** (`--method {name}`): {rest} {_line(use)}\n",
            f"- {_line(paper)}",
            f"- `[pretrain.{name}]`: {settings or 'no settings'}.\n",
        )
    )


def _line(text: str) -> str:
    return " ".join(text.split())
