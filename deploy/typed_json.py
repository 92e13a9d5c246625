"""Dataclasses from JSON that nobody vouches for: every field is checked against its annotation."""

import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from noisyssl.errors import BundleError


def built(kind: Any, value: object, where: str) -> Any:
    """`value` from JSON as `kind`, fields checked by their annotations; unknown fields are ignored.

    Raises:
        BundleError: a field is missing or has another type; `where` names it.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, dict):
            raise BundleError(f"{where} is {short(value)}; it must be an object. Export the bundle again.")
        known = {}
        for item in fields(kind):
            if item.name in value:
                known[item.name] = built(item.type, value[item.name], f"{where}: {item.name}")
            elif item.default is MISSING and item.default_factory is MISSING:
                raise BundleError(f"{where} lacks {item.name!r}; every bundle has it. Export it again.")
        return kind(**known)
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    expected = {int: "a whole number", str: "text", dict: "an object", tuple: "a list"}[origin]
    if type(value) is not (list if origin is tuple else origin):
        raise BundleError(f"{where} is {short(value)}; it must be {expected}. Export the bundle again.")
    if isinstance(value, list):
        return tuple(built(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, dict) and inner[1] is not Any:
        return {key: built(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    return value


def short(value: object) -> str:
    """`value` as Python writes it, cut to fit into one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
