"""From YAML files, presets and dotted overrides to one validated ``RunConfig``.

``cache``, ``sampler``, ``attention`` and ``model`` are groups. ``cache: sliding_window`` is the preset of that name, a
mapping goes over the preset it names, and changing the name drops what belonged to the old one; so for
``cache.inner``, the policy that a wrapper takes. ``model: NAME`` is a family with its bundled weights,
``model: NAME=FOLDER`` a folder that is run like that family, and ``model: FOLDER`` one that is run like Self-Forcing
unless ``family`` says otherwise. Without a cache the model family's own is taken, else ``attention_sink``.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longtake.configs.families import family_names, load_family
from longtake.configs.fields import build, did_you_mean
from longtake.configs.run import ModelConfig, OutputConfig, PromptChange, RunConfig
from longtake.configs.start import StartConfig

# How a folder is run unless its family is given, here as in ``LongVideoPipeline.from_pretrained``.
FOLDER_FAMILY = "self_forcing"
# For models that were trained with full history, and for fields without a policy's name.
DEFAULT_CACHE = "attention_sink"
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


@dataclass(frozen=True)
class _Group:
    """A folder of presets and the key by which a mapping names one."""

    folder: str
    key: str
    what: str


GROUPS = (
    _Group("model", "family", "model family"),
    _Group("cache", "policy", "cache policy"),
    _Group("sampler", "name", "sampler"),
    _Group("attention", "policy", "attention policy"),
)


def preset_names(folder: str) -> list[str]:
    """List the presets of a group.

    Args:
        folder: ``cache``, ``sampler``, ``attention`` or ``model``.
    """
    if folder == "model":
        return family_names()
    entries = files("longtake.configs").joinpath(folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_preset(folder: str, name: str) -> dict[str, Any]:
    """Read one preset.

    Args:
        folder: ``cache``, ``sampler``, ``attention`` or ``model``.
        name: One of ``preset_names(folder)``.

    Raises:
        ValueError: If there is none of that name; offers the nearest.
    """
    known = preset_names(folder)
    if name not in known:
        what = next(group.what for group in GROUPS if group.folder == folder)
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")
    if folder == "model":
        return {"family": name}
    return _read_bundled(folder, f"{name}.yaml")


def load_run(
    path: Path | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Put a run together: defaults, then the file, then options, then dotted overrides.

    Args:
        path: A YAML file with any of the run's keys.
        options: Top-level keys with their values; None values are left out.
        overrides: ``key=value`` or ``group.key=value``; values are read as YAML.

    Returns:
        The validated configuration. The fields of ``cache`` and ``sampler`` are checked by their registries.

    Raises:
        ValueError: With the key, the value, and what would be right.
    """
    given = {key: value for key, value in (options or {}).items() if value is not None}
    # A prompt is text as it stands: OmegaConf must not read ${...} in it.
    literal = {key: given.pop(key) for key in ("prompt", "negative_prompt") if key in given}
    layers = [_read_bundled("default.yaml")]
    if path is not None:
        layers.append(_read(path))
    layers += [given, *(_parse_override(override) for override in overrides)]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    merged["cache"] = _cache_of(merged)
    return from_mapping(merged | literal)


def load_complete(path: Path) -> RunConfig:
    """Read a run that was saved whole: no preset and no default is consulted.

    Args:
        path: A YAML file with what ``RunConfig.as_mapping`` returns.

    Raises:
        ValueError: If the file cannot be read or a key is missing or unknown.
    """
    return from_mapping(_read(path))


def from_mapping(values: Mapping[str, Any]) -> RunConfig:
    """Build a run from a complete mapping, such as ``RunConfig.as_mapping`` returns.

    Args:
        values: The run's keys.

    Raises:
        ValueError: If a key is unknown or a value does not fit.
    """
    known = [field.name for field in fields(RunConfig)]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {key!r} for the run; known: {', '.join(known)}.{did_you_mean(key, known)}")
    for key in ("model", "cache", "sampler", "prompt"):
        if key not in values:
            raise ValueError(f"the run lacks {key!r}")
    values = dict(values)
    model = build(ModelConfig, _mapping(values["model"], "model"), what="the model")
    sampler = _mapping(values["sampler"] or {}, "sampler")
    if "name" not in sampler:
        # Fields alone go over the sampler that the model family was made for.
        sampler = {**load_family(model.family).sampler, **sampler}
    changes, start = values.get("prompt_changes") or [], values.get("start")
    if isinstance(changes, str | Mapping):
        raise ValueError("prompt_changes must be a list of mappings with the keys at, prompt and event")
    groups = {
        "model": model,
        "cache": _mapping(values["cache"], "cache"),
        "sampler": sampler,
        "attention": _mapping(values.get("attention") or {"policy": "dense"}, "attention"),
        "prompt_changes": tuple(_build_change(change) for change in changes),
        "start": _build_start(_mapping(start, "start")) if start else None,
        "output": build(OutputConfig, _mapping(values.get("output") or {}, "output"), what="the output"),
    }
    plain = {key: value for key, value in values.items() if key not in groups}
    # The plain keys are checked and converted by themselves, then joined with the groups that are built already.
    return build(RunConfig, plain | groups, what="the run")


def is_override(text: str) -> bool:
    """Whether a command line word is ``key=value``."""
    return OVERRIDE.fullmatch(text) is not None


def _merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    base, layer = dict(base), dict(layer)
    for group in GROUPS:
        if layer.get(group.folder) is not None:
            base[group.folder] = _merge_group(group, base.get(group.folder) or {}, layer.pop(group.folder))
    try:
        return OmegaConf.to_container(OmegaConf.merge(base, layer), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration: {str(error).splitlines()[0]}") from error


def _merge_group(group: _Group, base: Mapping[str, Any], value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _named_model(value) if group.folder == "model" else {group.key: value}
    value = _mapping(value, group.folder)
    name = value.get(group.key)
    if group.folder != "model" and name is not None and name != base.get(group.key):
        base = load_preset(group.folder, name)
    if group.folder == "model" and name is not None:
        # A family that is named is held to its size.
        base = {key: entry for key, entry in base.items() if key != "any_size"}
    if value.get("inner") is not None:
        # A wrapper's policy is a group in a group.
        value["inner"] = _merge_group(group, base.get("inner") or {}, value["inner"])
    return {**base, **value}


def _named_model(name: str) -> dict[str, Any]:
    """A model is named by its family, by its folder, or by both."""
    family, sign, path = name.partition("=")
    if sign and not Path(name).exists():
        load_family(family)
        if not path:
            raise ValueError(f"model {name!r} names no folder after the sign: write {family}=FOLDER")
        return {"family": family, "path": path}
    if name not in family_names() and (os.sep in name or Path(name).exists()):
        return {"family": FOLDER_FAMILY, "path": name, "any_size": True}
    load_family(name)
    return {"family": name, "path": None}


def _cache_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The cache of a run; without a policy's name its fields go over the model family's own, or the default one."""
    group = next(group for group in GROUPS if group.folder == "cache")
    cache = _mapping(run.get("cache") or {}, "cache")
    if group.key in cache:
        return cache
    model = build(ModelConfig, _mapping(run.get("model"), "model"), what="the model")
    own = load_family(model.family).cache or {group.key: DEFAULT_CACHE}
    return _merge_group(group, _merge_group(group, {}, own), cache)


def _parse_override(override: str) -> dict[str, Any]:
    if not is_override(override):
        raise ValueError(f"{override!r} is no override: write key=value, for example cache.num_context_frames=9")
    key, text = override.split("=", 1)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {override!r} is no YAML: put it into quotes") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error
    return _parse(text, where=str(path))


def _read_bundled(*parts: str) -> dict[str, Any]:
    return _parse(files("longtake.configs").joinpath(*parts).read_text(encoding="utf-8"), where="/".join(parts))


def _parse(text: str, *, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    return _mapping({} if values is None else values, where)


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}: it must be a mapping of keys to values")
    if not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} has keys that are no text: {_listed(value)}")
    return dict(value)


def _build_change(change: Any) -> PromptChange:
    values = _mapping(change, "an entry of prompt_changes")
    for key in ("at", "prompt"):
        if key not in values:
            raise ValueError(f"an entry of prompt_changes lacks {key!r}: give at (seconds) and prompt")
    return build(PromptChange, values, what="prompt_changes")


def _build_start(values: Mapping[str, Any]) -> StartConfig:
    start = build(StartConfig, values, what="the start")
    # Absolute, so that a run is resumed from anywhere.
    return replace(start, **{start.kind: str(Path(start.path).absolute())})


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(repr(value) for value in values)
