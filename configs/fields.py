"""Mappings from YAML or Python to frozen dataclasses: unknown keys and wrong types are named, never guessed."""

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], *, what: str) -> T:
    """Make a dataclass from a mapping of its fields.

    Args:
        cls: A dataclass; tuples may be given as lists.
        values: Field names and values.
        what: How errors call it, e.g. ``cache policy 'attention_sink'``.

    Raises:
        ValueError: If a key is unknown (the nearest known one is offered) or a value has the wrong type.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    converted = {}
    for key, value in values.items():
        if key not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"unknown key {key!r} for {what}; known: {listed}.{did_you_mean(key, known)}")
        converted[key] = _converted(value, hints[key], f"{key} of {what}")
    return cls(**converted)


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Offer the nearest known name as a sentence with a leading space, or nothing."""
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def choose(table: Mapping[str, T], name: Any, *, what: str) -> T:
    """Look a name up in an explicit registry.

    Raises:
        ValueError: If it is not there; names what is, and the nearest.
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(table)}.{did_you_mean(name, table)}")
    return table[name]


def make(table: Mapping[str, type[T]], settings: Mapping[str, Any] | str, *, key: str, what: str) -> T:
    """Make an entry of a registry from its YAML mapping.

    Args:
        table: Frozen dataclasses by name.
        settings: ``{key: NAME, field: value, ...}``, or a name alone for all defaults.
        key: Which entry of the mapping holds the name.
        what: How errors call the thing, e.g. ``cache policy``.

    Raises:
        ValueError: If the name or a field is unknown, with the nearest known one, or a value does not fit.
    """
    values = {key: settings} if isinstance(settings, str) else dict(settings)
    if key not in values:
        raise ValueError(f"{what} settings need a key {key!r}, one of: {', '.join(table)}.")
    name = values.pop(key)
    return build(choose(table, name, what=what), values, what=f"{what} {name!r}")


def _converted(value: Any, hint: Any, name: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        return _one_of(value, [option for option in options if option is not type(None)], name)
    if origin is Literal:
        if value not in get_args(hint):
            listed = ", ".join(map(repr, get_args(hint)))
            raise ValueError(f"{name} is {value!r}; known: {listed}.{did_you_mean(value, map(str, get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
            raise ValueError(f"{name} is {value!r} but must be a list.")
        return tuple(_converted(item, get_args(hint)[0], name) for item in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {int: is_number and isinstance(value, int), float: is_number, bool: isinstance(value, bool)}
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}
    if hint in fits and not fits[hint]:
        raise ValueError(f"{name} is {value!r} but must be {wanted[hint]}.")
    if hint is str and not isinstance(value, str):
        raise ValueError(f"{name} is {value!r} but must be text.")
    return value


def _one_of(value: Any, hints: list[Any], name: str) -> Any:
    """Take the first type that fits; the error is the last one's."""
    for hint in hints[:-1]:
        try:
            return _converted(value, hint, name)
        except ValueError:
            continue
    return _converted(value, hints[-1], name)
