"""Schema engine of every YAML file: mappings to frozen dataclasses, with errors that name the nearest valid key.

Declare the schema as a frozen dataclass and call ``build(Schema, mapping, what="the protocol")``. Field types may be
int, float, bool, str, ``Literal``, ``X | None``, ``tuple[X, ...]``, ``Mapping`` and other such dataclasses; ranges
are checked by the dataclass's own ``__post_init__``.
"""

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib.resources import files
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def preset_names(folder: str) -> list[str]:
    """List the presets of a folder of ``configs``: cache, sampler, attention, model, heads, eval."""
    entries = files("longtake.configs").joinpath(folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def read_bundled(*parts: str) -> dict[str, Any]:
    """Read a YAML file of ``configs``."""
    return parse_yaml(files("longtake.configs").joinpath(*parts).read_text(encoding="utf-8"), where="/".join(parts))


def parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    """Read a mapping; nothing is an empty one."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    return mapping({} if values is None else values, where)


def build(cls: type[T], values: Mapping[str, Any], *, what: str) -> T:
    """Make a dataclass from a mapping of its fields, mappings in it included.

    Args:
        cls: A dataclass; tuples may be given as lists.
        values: Field names and values.
        what: Subject of error messages, e.g. ``cache policy 'attention_sink'``.

    Raises:
        ValueError: If a key is unknown (the nearest known one is offered) or missing, or a value has the wrong type.
    """
    hints, known = get_type_hints(cls), {field.name: field for field in fields(cast(Any, cls))}
    converted = {}
    for key, value in mapping(values, what).items():
        if key not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"unknown key {key!r} for {what}; known: {listed}.{did_you_mean(key, known)}")
        converted[key] = _converted(value, hints[key], key, what)
    for key, field in known.items():
        if key not in converted and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{what} lacks {key!r}")
    return cls(**converted)


def mapping(value: Any, what: str) -> dict[str, Any]:
    """Copy a mapping of texts to values."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}: it must be a mapping of keys to values")
    if not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} has keys that are no text: {', '.join(map(repr, value))}")
    return dict(value)


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Offer the nearest known name as a sentence with a leading space, or nothing."""
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def choose(table: Mapping[str, T], name: Any, *, what: str) -> T:
    """Look a name up in an explicit registry."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(table)}.{did_you_mean(name, table)}")
    return table[name]


def make(table: Mapping[str, type[T]], settings: Mapping[str, Any] | str, *, key: str, what: str) -> T:
    """Make an entry of a registry from its YAML mapping.

    Args:
        table: Frozen dataclasses by name.
        settings: ``{key: NAME, field: value, ...}``, or a name alone for all defaults.
        key: The mapping's entry that holds the name.
        what: Subject of error messages, e.g. ``cache policy``.
    """
    values = {key: settings} if isinstance(settings, str) else dict(settings)
    if key not in values:
        raise ValueError(f"{what} settings need a key {key!r}, one of: {', '.join(table)}.")
    name = values.pop(key)
    return build(choose(table, name, what=what), values, what=f"{what} {name!r}")


def _converted(value: Any, hint: Any, key: str, what: str) -> Any:
    name, origin = f"{key} of {what}", get_origin(hint)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        return None if value is None and len(options) < len(get_args(hint)) else _one_of(value, options, key, what)
    if origin is Literal:
        if value not in get_args(hint):
            listed = ", ".join(map(repr, get_args(hint)))
            raise ValueError(f"{name} is {value!r}; known: {listed}.{did_you_mean(value, map(str, get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
            raise ValueError(f"{name} is {value!r} but must be a list.")
        kind = get_args(hint)[0]
        return tuple(_entry(item, kind, key, what) for item in value)
    if is_dataclass(hint):
        return value if isinstance(value, cast(type, hint)) else build(cast(type, hint), value, what=f"the {name}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {int: is_number and isinstance(value, int), float: is_number, bool: isinstance(value, bool)}
    fits[str] = isinstance(value, str)
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in fits and not fits[hint]:
        raise ValueError(f"{name} is {value!r} but must be {wanted[hint]}.")
    return value


def _entry(value: Any, kind: Any, key: str, what: str) -> Any:
    if is_dataclass(kind) and not isinstance(value, cast(type, kind)):
        return build(cast(type, kind), value, what=f"an entry of {key} of {what}")
    return _converted(value, kind, key, what)


def _one_of(value: Any, hints: list[Any], key: str, what: str) -> Any:
    """Take the first type that fits; the error is the last one's."""
    for hint in hints[:-1]:
        try:
            return _converted(value, hint, key, what)
        except ValueError:
            continue
    return _converted(value, hints[-1], key, what)
