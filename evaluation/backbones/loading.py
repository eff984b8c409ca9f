"""Load backbones from a Python file of factories or from a YAML file; nothing is downloaded.

A Python file offers a backbone by a public class or function that is named after a role, whatever its case and
underscores, with or without a leading ``make``, ``build``, ``load`` or ``stub``: ``dino``, ``make_clip``,
``StubRaft``. It is called without arguments and gives an object that is called as the authors of the network do
(``encode_image``, ``embed``, ``(image1, image2, iters=20, test_mode=True)``, ...), or through the interfaces of
``backbones.base``. The object may have ``name``, ``weights`` (a path; its hash is recorded) and ``official``::

    import torch

    def make_dino():
        model = torch.hub.load("dino_checkout", "dino_vitb16", source="local", pretrained=False)
        model.load_state_dict(torch.load("dino_vitbase16_pretrain.pth", weights_only=True))
        model.name, model.weights, model.official = "dino_vitb16", "dino_vitbase16_pretrain.pth", True
        return model

A YAML file names a TorchScript file, or a factory, for each role. Paths are relative to the YAML file; a factory is
called with the path of ``weights``, or without arguments if there is none::

    dino: {torchscript: dino_vitb16.pt, sha256: 5f0b..., official: true}
    raft: {name: raft_things, factory: "my_networks.raft:build", weights: raft-things.pth}
    amt: {factory: "networks.py:make_amt"}
"""

import hashlib
import importlib
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtake.configs.fields import build
from longtake.evaluation.backbones.base import ROLES, Backbone, Backbones, check_role


def _adapt(
    role: str, model: Any, *, name: str, weights_sha256: str | None = None, official: bool = False, device: str = "cpu"
) -> Backbone:
    """Put a network into a role; it is moved to the device and set to evaluation."""
    kind = ROLES[role].kind
    if not re.fullmatch(r"[\w.+@:/-]+", name):
        raise ValueError(f"backbone name {name!r}: use letters, digits and . + - _ @ : / only")
    if wanted := kind.lacks(model):
        raise ValueError(f"backbone {name!r} ({role}) is {type(model).__name__}: it needs {wanted}")
    if official and weights_sha256 is None:
        raise ValueError(
            f"backbone {name!r} ({role}) is said to be official, without weights to show for it: name its weights file"
        )
    if isinstance(model, nn.Module):
        model = model.to(device).eval()
    return kind(role=role, model=model, name=name, weights_sha256=weights_sha256, official=official, device=device)


def _own(value: Any, attribute: str) -> Any:
    return getattr(value, attribute) if hasattr(value, attribute) else None


def load_backbones(path: Path, *, device: str = "cpu") -> Backbones:
    """Load the backbones that a ``.py`` file of factories or a ``.yaml`` file offers.

    It is code, or names code, that is run: only use files you trust.

    Raises:
        ValueError: If the file cannot be read or run, offers nothing, offers two for one role, a file it names is
            missing or has another hash, a factory fails, or what it gives cannot be used.
    """
    if not path.is_file():
        raise ValueError(f"no file of backbones at {path}: give a .py file of factories or a .yaml file")
    if path.suffix == ".py":
        return _from_python(path, device=device)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path, device=device)
    raise ValueError(f"{path.name}: backbones come from a .py file of factories or a .yaml file")


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _role_of(name: str) -> str | None:
    plain = re.sub("^(stub|build|make|load)", "", name.lower().replace("_", ""))
    names = {alias: role for role, facts in ROLES.items() for alias in (role.replace("_", ""), *facts.aliases)}
    return names.get(plain)


def _from_python(path: Path, *, device: str) -> Backbones:
    """The object that a factory makes may itself say its name, its weights and that it is official."""
    found = {}
    for role, factory in _factories(_run(path), path).items():
        default = _own(factory, "__name__") or role
        model = _made(factory, (), who=f"{path.name}: {default} ({role})")
        name, weights = _own(model, "name"), _own(model, "weights")
        found[role] = _adapt(
            role,
            model,
            name=name if isinstance(name, str) else default,
            weights_sha256=_file_sha256(Path(weights)) if isinstance(weights, str | Path) else None,
            official=_own(model, "official") is True,
            device=device,
        )
    return Backbones(found, {path.name: _file_sha256(path)})


def _run(path: Path) -> types.ModuleType:
    # Two files of the same name must not be one module.
    name = f"longtake_backbones_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot run the backbones file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"cannot run the backbones file {path}: {type(error).__name__}: {error}") from error
    return module


def _factories(module: types.ModuleType, path: Path) -> dict[str, Callable]:
    factories: dict[str, Callable] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or not callable(value):
            continue
        # What the file only imports, it does not offer.
        if isinstance(value, type | types.FunctionType) and value.__module__ != module.__name__:
            continue
        role = _role_of(name)
        if role is None:
            continue
        if role in factories:
            other = _own(factories[role], "__name__") or "another"
            raise ValueError(
                f"{path.name} offers two backbones for {role!r}, {other} and {name}: start the name of one with '_'"
            )
        factories[role] = value
    if not factories:
        raise ValueError(
            f"{path.name} offers no backbone: name a public class or function after its role, e.g. make_dino; "
            f"roles: {', '.join(ROLES)}"
        )
    return factories


def _made(factory: Callable, arguments: tuple, *, who: str) -> Any:
    try:
        model = factory(*arguments)
    except Exception as error:
        raise ValueError(f"{who} failed: {type(error).__name__}: {error}") from error
    if model is None:
        raise ValueError(f"{who} gave nothing: it must return the network")
    return model


@dataclass(frozen=True, kw_only=True)
class _BackboneEntry:
    name: str | None = None  # goes into metrics' names; the file's or the function's name if not given
    torchscript: str | None = None  # a TorchScript file; it holds the weights
    factory: str | None = None  # ``package.module:function`` or ``FILE.py:function``
    weights: str | None = None  # a file, handed to the factory
    sha256: str | None = None  # of the TorchScript file or the weights file, to be checked
    official: bool = False  # this is the network, with the weights, that VBench uses here

    def __post_init__(self) -> None:
        if (self.torchscript is None) == (self.factory is None):
            raise ValueError("a backbone needs either torchscript: FILE or factory: MODULE:FUNCTION")
        if self.torchscript is not None and self.weights is not None:
            raise ValueError("a torchscript file holds its weights: leave out weights")
        if self.factory is not None and self.factory.count(":") != 1:
            raise ValueError(f"factory {self.factory!r} is not MODULE:FUNCTION")
        if self.sha256 is not None and self.torchscript is None and self.weights is None:
            raise ValueError("sha256 without a file to check: name the weights")


def _from_yaml(path: Path, *, device: str) -> Backbones:
    entries = _entries(path)
    files = {path.name: _file_sha256(path)}
    # Every file is there and has its hash before the first network is made.
    weights = {role: _weights(entry, path.parent, role=role) for role, entry in entries.items()}
    codes = {role: _code(entry, path.parent, role=role) for role, entry in entries.items()}
    files |= {code.name: _file_sha256(code) for code in codes.values() if code is not None}
    found = {}
    for role, entry in entries.items():
        file, sha256 = weights[role]
        stem = Path(entry.torchscript).stem if entry.torchscript else (entry.factory or "").partition(":")[2]
        found[role] = _adapt(
            role,
            _model(entry, file, codes[role], role=role, device=device),
            name=entry.name or stem,
            weights_sha256=sha256,
            official=entry.official,
            device=device,
        )
    return Backbones(found, files)


def _entries(path: Path) -> dict[str, _BackboneEntry]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read the backbones file {path}: {error}") from error
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{path.name} offers no backbone: give a mapping from roles ({', '.join(ROLES)})")
    entries = {}
    for role, settings in values.items():
        check_role(str(role))
        if not isinstance(settings, Mapping):
            raise ValueError(f"{path.name}: {role} is {settings!r}: give a mapping with torchscript or factory")
        try:
            entries[role] = build(_BackboneEntry, settings, what=f"backbone {role!r}")
        except ValueError as error:
            raise ValueError(f"{path.name}, {role}: {error}") from error
    return entries


def _weights(entry: _BackboneEntry, folder: Path, *, role: str) -> tuple[Path | None, str | None]:
    stated = entry.torchscript or entry.weights
    if stated is None:
        return None, None
    file = folder / Path(stated).expanduser()
    if not file.is_file():
        raise ValueError(f"backbone {role!r}: no file {file}; weights are not downloaded: put it there")
    found = _file_sha256(file)
    if entry.sha256 is not None and found != entry.sha256.lower():
        raise ValueError(
            f"backbone {role!r}: {file.name} has SHA-256 {found}, not {entry.sha256}: another file, or a broken one"
        )
    return file, found


def _code(entry: _BackboneEntry, folder: Path, *, role: str) -> Path | None:
    module = (entry.factory or "").partition(":")[0]
    if not module.endswith(".py"):
        return None
    file = folder / Path(module).expanduser()
    if not file.is_file():
        raise ValueError(f"backbone {role!r}: no file {file}")
    return file


def _model(entry: _BackboneEntry, weights: Path | None, code: Path | None, *, role: str, device: str) -> Any:
    if entry.torchscript is not None and weights is not None:
        try:
            with warnings.catch_warnings():
                # The weights are published as TorchScript; that torch prefers another format helps nobody here.
                warnings.simplefilter("ignore", DeprecationWarning)
                return torch.jit.load(weights, map_location=device)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"backbone {role!r}: {weights.name} is no TorchScript file: {error}") from error
    name, _, function = (entry.factory or "").partition(":")
    try:
        module = importlib.import_module(name) if code is None else _run(code)
    except ImportError as error:
        raise ValueError(f"backbone {role!r}: cannot import {name!r}: {error}") from error
    factory = _own(module, function)
    if not callable(factory):
        raise ValueError(f"backbone {role!r}: {name!r} has no function {function!r}")
    arguments = () if weights is None else (str(weights),)
    return _made(factory, arguments, who=f"backbone {role!r}: {entry.factory}")
