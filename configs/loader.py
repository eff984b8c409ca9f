"""From YAML files, presets and dotted overrides to one validated ``RunConfig``.

``cache``, ``sampler``, ``attention`` and ``model`` are groups. ``cache: sliding_window`` is the preset of that name,
``cache: FILE.yaml`` is what that file holds (paths are relative to the current folder), and a mapping goes over the
preset it names. Changing the name drops what belonged to the old one; so for ``cache.inner``, a wrapper's policy.
``model: NAME`` is a family with its bundled weights, ``model: NAME=FOLDER`` a folder that is run like it, and
``model: FOLDER`` one that is run like Self-Forcing unless ``family`` says otherwise. Without a cache the family's
own is taken, else ``attention_sink``.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longtake.configs.families import family_names, load_family
from longtake.configs.fields import build, choose, mapping, parse_yaml, preset_names, read_bundled
from longtake.configs.registry import POLICY_GROUP, external
from longtake.configs.run import ModelConfig, RunConfig

# Family of a model folder that is given without one, here as in ``LongVideoPipeline.from_pretrained``.
FOLDER_FAMILY = "self_forcing"
# For models that were trained with full history, and for fields without a policy's name.
_DEFAULT_CACHE = "attention_sink"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


class _Group(NamedTuple):
    folder: str
    key: str
    what: str


_GROUPS = {
    "model": _Group("model", "family", "model family"),
    "cache": _Group("cache", "policy", "cache policy"),
    "sampler": _Group("sampler", "name", "sampler"),
    "attention": _Group("attention", "policy", "attention policy"),
}


def load_preset(folder: str, name: str) -> dict[str, Any]:
    """Read a preset of ``cache``, ``sampler``, ``attention`` or ``model``."""
    if folder == "cache" and name in external(POLICY_GROUP):
        return {"policy": name}
    choose(dict.fromkeys(preset_names(folder)), name, what=_GROUPS[folder].what)
    return {"family": name} if folder == "model" else read_bundled(folder, f"{name}.yaml")


def load_run(
    path: Path | None = None, *, options: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
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
    layers = [read_bundled("default.yaml")]
    if path is not None:
        layers.append(_read(path))
    layers += [given, *(_parse_override(override) for override in overrides)]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    merged["cache"] = _cache_of(merged)
    return _from_mapping(merged | literal)


def load_complete(path: Path) -> RunConfig:
    """Read a run that was saved whole, what ``RunConfig.as_mapping`` returns: no preset is consulted.

    Raises:
        ValueError: If the file cannot be read or a key is missing or unknown.
    """
    return _from_mapping(_read(path))


def _from_mapping(values: Mapping[str, Any]) -> RunConfig:
    """Build a run from a complete mapping, such as ``RunConfig.as_mapping`` returns; null is the default."""
    if "sampler" not in values:
        raise ValueError("the run lacks 'sampler'")
    given = {key: value for key, value in values.items() if value is not None}
    sampler = mapping(given.get("sampler", {}), "sampler")
    if "name" not in sampler and "model" in given:
        # Fields alone go over the sampler that the model family was made for.
        family = build(ModelConfig, given["model"], what="the model").family
        given["sampler"] = {**load_family(family).sampler, **sampler}
    return build(RunConfig, given, what="the run")


def is_override(text: str) -> bool:
    """Tell whether a command line word is ``key=value``."""
    return _OVERRIDE.fullmatch(text) is not None


def _merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    base, layer = dict(base), dict(layer)
    for group in _GROUPS.values():
        if layer.get(group.folder) is not None:
            base[group.folder] = _merge_group(group, base.get(group.folder) or {}, layer.pop(group.folder))
    try:
        return mapping(OmegaConf.to_container(OmegaConf.merge(base, layer), resolve=True), "the configuration")
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration: {str(error).splitlines()[0]}") from error


def _merge_group(group: _Group, base: Mapping[str, Any], value: Any) -> dict[str, Any]:
    if isinstance(value, str) and group.folder == "model":
        value = _named_model(value)
    elif isinstance(value, str):
        value = _read(Path(value)) if value.endswith((".yaml", ".yml")) else {group.key: value}
    value = mapping(value, group.folder)
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
    group = _GROUPS["cache"]
    cache = mapping(run.get("cache") or {}, "cache")
    if group.key in cache:
        return cache
    model = build(ModelConfig, mapping(run.get("model"), "model"), what="the model")
    own = load_family(model.family).cache or {group.key: _DEFAULT_CACHE}
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
    return parse_yaml(text, where=str(path))
