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
import inspect
import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longtake.configs.fields import build
from longtake.evaluation.backbones.base import (
    ROLES,
    AestheticHead,
    Backbones,
    FlowEstimator,
    FrameEncoder,
    FrameScorer,
    Interpolator,
    VideoTextScorer,
    check_role,
)

RAFT_ITERATIONS = 20  # refinement steps of RAFT in VBench's dynamic degree


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    """A network in a role."""

    # names under which networks offer the role's own function; without any, they are called themselves
    methods: ClassVar[tuple[str, ...]]

    role: str  # key of ``ROLES``
    model: Any  # the network, called the way its authors call it, or through the role's own interface
    name: str  # goes into metrics' names
    weights_sha256: str | None = None  # of its weights file
    official: bool = False  # whether it is VBench's own choice
    device: str = "cpu"  # where the network lives; results come back to the CPU

    @classmethod
    def lacks(cls, model: Any) -> str | None:
        """Methods that a model would need to fill the role; None if it has one, or can be called."""
        if callable(model) or any(_has_method(model, method) for method in cls.methods):
            return None
        return " or ".join(cls.methods) + ", or to be callable itself"

    def _call(self, *inputs: Any, methods: tuple[str, ...] | None = None, **options: Any) -> Any:
        """Run without gradients, with tensors on the device and only the options the function knows."""
        names = self.methods if methods is None else methods
        function = next((getattr(self.model, name) for name in names if _has_method(self.model, name)), self.model)
        moved = [value.to(self.device) if isinstance(value, Tensor) else value for value in inputs]
        known = {key: value for key, value in options.items() if _takes(function, key)}
        with torch.no_grad():
            return function(*moved, **known)

    def _checked(self, output: Any, *shape: int | None) -> Tensor:
        """Refuse what is not a finite tensor of that shape; None stands for any length."""
        if not isinstance(output, Tensor):
            raise ValueError(f"{self._who} gave {type(output).__name__}, not a tensor")
        fits = output.ndim == len(shape) and all(
            want in (None, have) for want, have in zip(shape, output.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise ValueError(f"{self._who} gave a tensor of shape {tuple(output.shape)}: needs ({wanted})")
        output = output.detach().to("cpu", torch.float32)
        if not output.isfinite().all():
            raise ValueError(f"{self._who} gave NaN or infinity: check its weights and its precision")
        return output

    @property
    def _who(self) -> str:
        return f"backbone {self.name!r} ({self.role})"


class _EncoderAdapter(_Adapter):
    methods = ("encode", "encode_image", "embed")

    def encode(self, images: Tensor) -> Tensor:
        return self._checked(self._call(images), len(images), None)


class _HeadAdapter(_Adapter):
    methods = ("rate",)

    def rate(self, features: Tensor) -> Tensor:
        try:
            output = self._call(features)
        except RuntimeError as error:
            raise ValueError(
                f"{self._who} does not take features of length {features.shape[-1]}: it belongs to CLIP ViT-L/14 "
                "(768), given as 'aesthetic_clip'"
            ) from error
        return self._checked(output, len(features), 1)

    __call__ = rate


class _ScorerAdapter(_Adapter):
    methods = ("score",)

    def score(self, image: Tensor) -> float:
        output = self._call(image)
        if isinstance(output, Tensor) and output.numel() != 1:
            raise ValueError(f"{self._who} gave {output.numel()} numbers for one image: needs one")
        try:
            value = float(output)
        except TypeError as error:
            raise ValueError(f"{self._who} gave {type(output).__name__}, not a number") from error
        if not math.isfinite(value):
            raise ValueError(f"{self._who} gave {value}: check its weights and its precision")
        return value


class _FlowAdapter(_Adapter):
    """``flow``, or RAFT's ``(image1, image2, iters=20, test_mode=True) -> (..., flow)``."""

    methods = ("flow",)

    def flow(self, a: Tensor, b: Tensor) -> Tensor:
        output = self._call(a, b, iters=RAFT_ITERATIONS, test_mode=True)
        # RAFT gives (flow at an eighth of the size, flow), or a list of refinements: the last is the one.
        if isinstance(output, list | tuple) and output:
            output = output[-1]
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == 1:
            output = output[0]
        return self._checked(output, 2, *a.shape[-2:])


class _InterpolatorAdapter(_Adapter):
    """``middle``, or AMT's ``(in_0, in_1, embt) -> {"imgt_pred": image}``."""

    methods = ("middle",)

    def middle(self, a: Tensor, b: Tensor) -> Tensor:
        if _has_method(self.model, "middle"):
            output = self._call(a, b)
        else:
            output = self._call(a, b, torch.full((1, 1, 1, 1), 0.5), scale_factor=1.0, eval=True)
        if isinstance(output, dict):
            if "imgt_pred" not in output:
                raise ValueError(f"{self._who} gave a dict with {sorted(output)}: needs 'imgt_pred'")
            output = output["imgt_pred"]
        return self._checked(output, *a.shape)


class _VideoTextAdapter(_Adapter):
    """``encode_video`` or ViCLIP's ``encode_vision(clips, test=True)``, and ``encode_text(text)``."""

    methods = ("encode_video", "encode_vision")

    @classmethod
    def lacks(cls, model: Any) -> str | None:
        if _has_method(model, "encode_text") and any(_has_method(model, method) for method in cls.methods):
            return None
        return "encode_text and encode_video (or encode_vision)"

    def encode_video(self, clips: Tensor) -> Tensor:
        return self._checked(self._call(clips, test=True), len(clips), None)

    def encode_text(self, text: str) -> Tensor:
        output = self._call(text, methods=("encode_text",))
        if isinstance(output, Tensor) and output.ndim == 1:
            output = output[None]
        return self._checked(output, 1, None)


_ADAPTERS: Mapping[type, type[_Adapter]] = {
    FrameEncoder: _EncoderAdapter,
    AestheticHead: _HeadAdapter,
    FrameScorer: _ScorerAdapter,
    FlowEstimator: _FlowAdapter,
    Interpolator: _InterpolatorAdapter,
    VideoTextScorer: _VideoTextAdapter,
}


def _adapt(
    role: str, model: Any, *, name: str, weights_sha256: str | None = None, official: bool = False, device: str = "cpu"
) -> _Adapter:
    """Put a network into a role; it is moved to the device and set to evaluation.

    Raises:
        ValueError: If the object cannot be called in any of the known ways, is said to be official without the
            hash of its weights, or its name does not fit into brackets in metrics' names.
    """
    adapter = _ADAPTERS[ROLES[role].kind]
    if not re.fullmatch(r"[\w.+@:/-]+", name):
        raise ValueError(f"backbone name {name!r}: use letters, digits and . + - _ @ : / only")
    if wanted := adapter.lacks(model):
        raise ValueError(f"backbone {name!r} ({role}) is {type(model).__name__}: it needs {wanted}")
    if official and weights_sha256 is None:
        raise ValueError(
            f"backbone {name!r} ({role}) is said to be official, without weights to show for it: name its weights file"
        )
    if isinstance(model, nn.Module):
        model = model.to(device).eval()
    return adapter(role=role, model=model, name=name, weights_sha256=weights_sha256, official=official, device=device)


def _has_method(model: Any, name: str) -> bool:
    return callable(_own(model, name))


def _own(value: Any, attribute: str) -> Any:
    return getattr(value, attribute) if hasattr(value, attribute) else None


def _takes(function: Callable, option: str) -> bool:
    """Whether a function can be given a keyword; what hides its signature is given none."""
    if isinstance(function, torch.jit.ScriptModule):
        return False
    # A module's own __call__ takes anything and hands it to forward.
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.kind is p.VAR_KEYWORD or p.name == option for p in parameters)


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
    """SHA-256 of a file's bytes, in hex; a file that has not changed is read once per process."""
    try:
        status = path.stat()
        return _sha256(path.resolve(), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _role_of(name: str) -> str | None:
    """The role that a class or function of this name offers a backbone for, None if none."""
    plain = re.sub("^(stub|build|make|load)", "", name.lower().replace("_", ""))
    names = {alias: role for role, facts in ROLES.items() for alias in (role.replace("_", ""), *facts.aliases)}
    return names.get(plain)


def _from_python(path: Path, *, device: str) -> Backbones:
    factories = _factories(_run(path), path)
    found = {role: _from_factory(role, factory, where=path.name, device=device) for role, factory in factories.items()}
    return Backbones(found, {path.name: _file_sha256(path)})


def _run(path: Path) -> types.ModuleType:
    """Execute a Python file as a module of its own."""
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


def _from_factory(role: str, factory: Callable, *, where: str, device: str) -> _Adapter:
    """Make a backbone of a Python file; the object itself may say its name, its weights and whether it is official."""
    default = _own(factory, "__name__") or role
    model = _made(factory, (), who=f"{where}: {default} ({role})")
    name, weights = (_own(model, attribute) for attribute in ("name", "weights"))
    return _adapt(
        role,
        model,
        name=name if isinstance(name, str) else default,
        weights_sha256=_file_sha256(Path(weights)) if isinstance(weights, str | Path) else None,
        official=_own(model, "official") is True,
        device=device,
    )


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
    """One role of a YAML file."""

    name: str | None = None  # goes into metrics' names; the file's or the function's name if not given
    torchscript: str | None = None  # a TorchScript file; it holds the weights
    factory: str | None = None  # ``package.module:function`` or ``FILE.py:function``
    weights: str | None = None  # a file, handed to the factory
    sha256: str | None = None  # of the TorchScript file or the weights file, to be checked
    official: bool = False  # whether this is the network, with the weights, that VBench uses here

    def __post_init__(self) -> None:
        if (self.torchscript is None) == (self.factory is None):
            raise ValueError("a backbone needs either torchscript: FILE or factory: MODULE:FUNCTION")
        if self.torchscript is not None and self.weights is not None:
            raise ValueError("a torchscript file holds its weights: leave out weights")
        if self.factory is not None and self.factory.count(":") != 1:
            raise ValueError(f"factory {self.factory!r} is not MODULE:FUNCTION")
        if self.sha256 is not None and self.torchscript is None and self.weights is None:
            raise ValueError("sha256 without a file to check: name the weights")

    @property
    def module(self) -> str:
        """Of the factory: ``package.module`` or ``FILE.py``."""
        return (self.factory or "").split(":")[0]

    @property
    def function(self) -> str:
        """Name of the factory in its module."""
        return (self.factory or "").split(":")[-1]


def _from_yaml(path: Path, *, device: str) -> Backbones:
    entries = _entries(path)
    files = {path.name: _file_sha256(path)}
    # Every file is there and has its hash before the first network is made.
    weights = {role: _weights(entry, path.parent, role=role) for role, entry in entries.items()}
    codes = {role: _code(entry, path.parent, role=role) for role, entry in entries.items()}
    files |= {code.name: _file_sha256(code) for code in codes.values() if code is not None}
    found = {
        role: _adapt(
            role,
            _model(entry, weights[role], codes[role], role=role, device=device),
            name=entry.name or (Path(entry.torchscript).stem if entry.torchscript else entry.function),
            weights_sha256=None if (file := weights[role]) is None else _file_sha256(file),
            official=entry.official,
            device=device,
        )
        for role, entry in entries.items()
    }
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


def _weights(entry: _BackboneEntry, folder: Path, *, role: str) -> Path | None:
    """The file of an entry's weights, if it names one, with the hash it states."""
    stated = entry.torchscript or entry.weights
    if stated is None:
        return None
    file = folder / Path(stated).expanduser()
    if not file.is_file():
        raise ValueError(f"backbone {role!r}: no file {file}; weights are not downloaded: put it there")
    found = _file_sha256(file)
    if entry.sha256 is not None and found != entry.sha256.lower():
        raise ValueError(
            f"backbone {role!r}: {file.name} has SHA-256 {found}, not {entry.sha256}: another file, or a broken one"
        )
    return file


def _code(entry: _BackboneEntry, folder: Path, *, role: str) -> Path | None:
    """The Python file that the factory is in, if it is given as one."""
    if not entry.module.endswith(".py"):
        return None
    file = folder / Path(entry.module).expanduser()
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
    try:
        module = importlib.import_module(entry.module) if code is None else _run(code)
    except ImportError as error:
        raise ValueError(f"backbone {role!r}: cannot import {entry.module!r}: {error}") from error
    factory = _own(module, entry.function)
    if not callable(factory):
        raise ValueError(f"backbone {role!r}: {entry.module!r} has no function {entry.function!r}")
    arguments = () if weights is None else (str(weights),)
    return _made(factory, arguments, who=f"backbone {role!r}: {entry.factory}")
