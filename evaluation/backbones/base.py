"""Backbones: frozen networks, or stand-ins for them, behind one of six small interfaces."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longtake.configs.fields import did_you_mean

RAFT_ITERATIONS = 20  # refinement steps of RAFT in VBench's dynamic degree


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network in a role."""

    # names under which networks offer the role's own function; without any, they are called themselves
    methods: ClassVar[tuple[str, ...]]

    role: str  # key of ``ROLES``
    model: Any  # the network, called the way its authors call it, or through the role's own interface
    name: str  # part of the names of the metrics that use it
    weights_sha256: str | None = None  # of its weights file, where it has one
    official: bool = False  # the network, with the weights, that VBench uses in this place
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


class FrameEncoder(Backbone):
    """Frames to vectors: DINO, CLIP, DINOv2, DreamSim."""

    methods = ("encode", "encode_image", "embed")

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float, after the role's transform -> (B, D) float32, not normalised."""
        return self._checked(self._call(images), len(images), None)


class _AestheticHead(Backbone):
    methods = ("rate",)

    def rate(self, features: Tensor) -> Tensor:
        """(B, 768) float, of length 1 -> (B, 1) float32, about 0..10."""
        try:
            output = self._call(features)
        except RuntimeError as error:
            raise ValueError(
                f"{self._who} does not take features of length {features.shape[-1]}: it belongs to CLIP ViT-L/14 "
                "(768), given as 'aesthetic_clip'"
            ) from error
        return self._checked(output, len(features), 1)


class _FrameScorer(Backbone):
    methods = ("score",)

    def score(self, image: Tensor) -> float:
        """(1, 3, h, w) float in 0..1 -> a number, for MUSIQ 0..100."""
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


class _FlowEstimator(Backbone):
    methods = ("flow",)

    def flow(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (1, 3, H, W) float in 0..255 -> (2, H, W) float32, x then y, in pixels.

        What is at p in ``a`` is at p + flow(p) in ``b``. The size is the input's, whatever padding was done to it.
        """
        output = self._call(a, b, iters=RAFT_ITERATIONS, test_mode=True)
        # RAFT gives (flow at an eighth of the size, flow), or a list of refinements: the last is the one.
        if isinstance(output, list | tuple) and output:
            output = output[-1]
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == 1:
            output = output[0]
        return self._checked(output, 2, *a.shape[-2:])


class _Interpolator(Backbone):
    methods = ("middle",)

    def middle(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (1, 3, H, W) float in 0..1 -> the frame half-way, same shape, float32."""
        if _has_method(self.model, "middle"):
            output = self._call(a, b)
        else:
            output = self._call(a, b, torch.full((1, 1, 1, 1), 0.5), scale_factor=1.0, eval=True)
        if isinstance(output, dict):
            if "imgt_pred" not in output:
                raise ValueError(f"{self._who} gave a dict with {sorted(output)}: needs 'imgt_pred'")
            output = output["imgt_pred"]
        return self._checked(output, *a.shape)


class _VideoTextScorer(Backbone):
    """Clips and texts to vectors of one space: ViCLIP, with its ``encode_vision(clips, test=True)``."""

    methods = ("encode_video", "encode_vision")

    @classmethod
    def lacks(cls, model: Any) -> str | None:
        if _has_method(model, "encode_text") and any(_has_method(model, method) for method in cls.methods):
            return None
        return "encode_text and encode_video (or encode_vision)"

    def encode_video(self, clips: Tensor) -> Tensor:
        """(B, 8, 3, 224, 224) float, after the CLIP transform -> (B, D) float32, not normalised."""
        return self._checked(self._call(clips, test=True), len(clips), None)

    def encode_text(self, text: str) -> Tensor:
        """A text -> (1, D) float32, not normalised."""
        output = self._call(text, methods=("encode_text",))
        if isinstance(output, Tensor) and output.ndim == 1:
            output = output[None]
        return self._checked(output, 1, None)


def _has_method(model: Any, name: str) -> bool:
    return hasattr(model, name) and callable(getattr(model, name))


def _takes(function: Callable, option: str) -> bool:
    """A function can be given this keyword; what hides its signature is given none."""
    if isinstance(function, torch.jit.ScriptModule):
        return False
    # A module's own __call__ takes anything and hands it to forward.
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.kind is p.VAR_KEYWORD or p.name == option for p in parameters)


@dataclass(frozen=True, kw_only=True)
class _Role:
    kind: type[Backbone]
    official: str  # the network that VBench has in this place
    aliases: tuple[str, ...] = ()  # other names under which a file of factories may offer it


ROLES: dict[str, _Role] = {
    "dino": _Role(kind=FrameEncoder, official="DINO ViT-B/16 (dino_vitbase16_pretrain.pth)"),
    "clip": _Role(kind=FrameEncoder, official="CLIP ViT-B/32 (ViT-B-32.pt)"),
    "aesthetic_clip": _Role(kind=FrameEncoder, official="CLIP ViT-L/14 (ViT-L-14.pt)", aliases=("clipl14",)),
    "aesthetic_head": _Role(kind=_AestheticHead, official="LAION aesthetic head (sa_0_4_vit_l_14_linear.pth)"),
    "musiq": _Role(kind=_FrameScorer, official="MUSIQ-SPAQ (musiq_spaq_ckpt-358bb6af.pth)"),
    "raft": _Role(kind=_FlowEstimator, official="RAFT (raft-things.pth, 20 iterations)"),
    "amt": _Role(kind=_Interpolator, official="AMT-S (amt-s.pth)"),
    "viclip": _Role(kind=_VideoTextScorer, official="ViCLIP (ViClip-InternVid-10M-FLT.pth)"),
    "dinov2": _Role(kind=FrameEncoder, official="DINOv2 ViT-B/14 (dinov2_vitb14_pretrain.pth)", aliases=("dino2",)),
    "dreamsim": _Role(kind=FrameEncoder, official="DreamSim (ensemble)"),
}
"""Every role, under the name that files and ``Backbones.get`` use."""


@dataclass(frozen=True)
class Backbones:
    """The backbones of one evaluation, by role."""

    found: Mapping[str, Any] = field(default_factory=dict)  # {role: backbone}
    # {file name: SHA-256} of the files they were made from, to be recorded with the results
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in self.found:
            check_role(role)

    @property
    def names(self) -> dict[str, str]:
        """{role: name of its backbone} of the roles that are filled."""
        return {role: self.found[role].name for role in ROLES if role in self.found}

    def get(self, role: str) -> Any | None:
        """The backbone of a role, if any; the ``clip`` stands in, unofficially, for a missing ``aesthetic_clip``."""
        check_role(role)
        backbone = self.found.get(role)
        if backbone is None and role == "aesthetic_clip" and "clip" in self.found:
            backbone = replace(self.found["clip"], official=False)
        return backbone

    def why_missing(self, role: str) -> str:
        """Reason for an empty role, and how to fill it."""
        return f"no backbone for {role!r}: needs {ROLES[role].official}, given in a file of backbones"


def check_role(role: str) -> None:
    """Refuse a role that does not exist; the error names the nearest."""
    if role not in ROLES:
        raise ValueError(f"unknown backbone role {role!r}; known: {', '.join(ROLES)}.{did_you_mean(role, ROLES)}")
