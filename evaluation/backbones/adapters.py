"""Make the networks' own ways of being called into the roles' interfaces, and check what comes out of them."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longtake.evaluation.backbones.base import (
    ROLES,
    AestheticHead,
    FlowEstimator,
    FrameEncoder,
    FrameScorer,
    Interpolator,
    VideoTextScorer,
)

RAFT_ITERATIONS = 20
"""Refinement steps of RAFT in VBench's dynamic degree."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A network in a role.

    Attributes:
        role: Which.
        model: The network, called the way its authors call it, or through the role's own interface.
        name: Goes into metrics' names.
        weights_sha256: Of its weights file.
        official: Whether it is VBench's own choice.
        device: Where the network lives; results come back to the CPU.
    """

    role: str
    model: Any
    name: str
    weights_sha256: str | None = None
    official: bool = False
    device: str = "cpu"

    def _call(self, function: Callable, *tensors: Any, **options: Any) -> Any:
        """Run without gradients, with tensors on the device and only the options the function knows."""
        moved = [t.to(self.device) if isinstance(t, Tensor) else t for t in tensors]
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


class EncoderAdapter(Adapter):
    """``encode``, ``encode_image``, ``embed``, or the network itself: (B, 3, H, W) -> (B, D)."""

    def encode(self, images: Tensor) -> Tensor:
        """See :class:`FrameEncoder`."""
        function = _first_method(self.model, "encode", "encode_image", "embed")
        return self._checked(self._call(function, images), len(images), None)


class HeadAdapter(Adapter):
    """``rate`` or the network itself: (B, 768) -> (B, 1)."""

    def rate(self, features: Tensor) -> Tensor:
        """See :class:`AestheticHead`."""
        function = _first_method(self.model, "rate")
        try:
            output = self._call(function, features)
        except RuntimeError as error:
            width = features.shape[-1]
            raise ValueError(
                f"{self._who} does not take features of length {width}: it belongs to CLIP ViT-L/14 (768), "
                "given as 'aesthetic_clip'"
            ) from error
        return self._checked(output, len(features), 1)

    __call__ = rate


class ScorerAdapter(Adapter):
    """``score`` or the network itself: (1, 3, h, w) -> a number."""

    def score(self, image: Tensor) -> float:
        """See :class:`FrameScorer`."""
        output = self._call(_first_method(self.model, "score"), image)
        if isinstance(output, Tensor) and output.numel() != 1:
            raise ValueError(f"{self._who} gave {output.numel()} numbers for one image: needs one")
        try:
            value = float(output)
        except TypeError as error:
            raise ValueError(f"{self._who} gave {type(output).__name__}, not a number") from error
        if not math.isfinite(value):
            raise ValueError(f"{self._who} gave {value}: check its weights and its precision")
        return value


class FlowAdapter(Adapter):
    """``flow``, or RAFT's ``(image1, image2, iters=20, test_mode=True) -> (..., flow)``."""

    def flow(self, a: Tensor, b: Tensor) -> Tensor:
        """See :class:`FlowEstimator`."""
        function = _first_method(self.model, "flow")
        output = self._call(function, a, b, iters=RAFT_ITERATIONS, test_mode=True)
        # RAFT gives (flow at an eighth of the size, flow), or a list of refinements: the last is the one.
        if isinstance(output, list | tuple) and output:
            output = output[-1]
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == 1:
            output = output[0]
        return self._checked(output, 2, *a.shape[-2:])


class InterpolatorAdapter(Adapter):
    """``middle``, or AMT's ``(in_0, in_1, embt) -> {"imgt_pred": image}``."""

    def middle(self, a: Tensor, b: Tensor) -> Tensor:
        """See :class:`Interpolator`."""
        if _has_method(self.model, "middle"):
            output = self._call(self.model.middle, a, b)
        else:
            time = torch.full((1, 1, 1, 1), 0.5)
            output = self._call(self.model, a, b, time, scale_factor=1.0, eval=True)
        if isinstance(output, dict):
            if "imgt_pred" not in output:
                raise ValueError(f"{self._who} gave a dict with {sorted(output)}: needs 'imgt_pred'")
            output = output["imgt_pred"]
        return self._checked(output, *a.shape)


class VideoTextAdapter(Adapter):
    """``encode_video`` or ViCLIP's ``encode_vision(clips, test=True)``, and ``encode_text(text)``."""

    def encode_video(self, clips: Tensor) -> Tensor:
        """See :class:`VideoTextScorer`."""
        function = _first_method(self.model, "encode_video", "encode_vision")
        return self._checked(self._call(function, clips, test=True), len(clips), None)

    def encode_text(self, text: str) -> Tensor:
        """See :class:`VideoTextScorer`."""
        output = self._call(self.model.encode_text, text)
        if isinstance(output, Tensor) and output.ndim == 1:
            output = output[None]
        return self._checked(output, 1, None)


_ADAPTERS: dict[type, tuple[type[Adapter], tuple[str, ...]]] = {
    FrameEncoder: (EncoderAdapter, ("encode", "encode_image", "embed")),
    AestheticHead: (HeadAdapter, ("rate",)),
    FrameScorer: (ScorerAdapter, ("score",)),
    FlowEstimator: (FlowAdapter, ("flow",)),
    Interpolator: (InterpolatorAdapter, ("middle",)),
    VideoTextScorer: (VideoTextAdapter, ()),
}


def adapt(
    role: str, model: Any, *, name: str, weights_sha256: str | None = None, official: bool = False, device: str = "cpu"
) -> Adapter:
    """Put a network into a role.

    Args:
        role: A key of ``ROLES``.
        model: An object with the role's own method, or with the one its authors gave it; networks are moved to the
            device and set to evaluation.
        name: Goes into the names of the metrics that use it.
        weights_sha256: Of its weights file.
        official: Whether it is the network, with the weights, that VBench uses here.
        device: For networks.

    Returns:
        An object with the role's interface.

    Raises:
        ValueError: If the object cannot be called in any of the known ways, or is said to be official without the
            hash of its weights.
    """
    adapter, methods = _ADAPTERS[ROLES[role].kind]
    if adapter is VideoTextAdapter:
        usable = _has_method(model, "encode_text") and any(
            _has_method(model, method) for method in ("encode_video", "encode_vision")
        )
        wanted = "encode_text and encode_video (or encode_vision)"
    else:
        usable = callable(model) or any(_has_method(model, method) for method in methods)
        wanted = " or ".join(methods) + ", or to be callable itself"
    if not usable:
        raise ValueError(f"backbone {name!r} ({role}) is {type(model).__name__}: it needs {wanted}")
    if official and weights_sha256 is None:
        raise ValueError(
            f"backbone {name!r} ({role}) is said to be official, without weights to show for it: name its weights file"
        )
    if isinstance(model, nn.Module):
        model = model.to(device).eval()
    return adapter(role=role, model=model, name=name, weights_sha256=weights_sha256, official=official, device=device)


def _has_method(model: Any, name: str) -> bool:
    return hasattr(model, name) and callable(getattr(model, name))


def _first_method(model: Any, *names: str) -> Callable:
    """The first of the methods it has, or itself."""
    return next((getattr(model, name) for name in names if _has_method(model, name)), model)


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
