"""Optical flow by OpenCV's DIS (Kroeger et al., ECCV 2016), in the RAFT role."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

MIN_SIDE = 16
"""Pixels: OpenCV's coarsest level needs a patch of 8 at half size."""
LUMA = (0.299, 0.587, 0.114)


def grey(image: Tensor) -> Tensor:
    """(1, 3, H, W) float RGB in 0..255 -> (H, W) float32 luma (BT.601)."""
    height, width = image.shape[-2:]
    return (torch.tensor(LUMA) @ image.float().reshape(3, -1)).view(height, width)


def check_pair(a: Tensor, b: Tensor) -> None:
    """Refuse what is not two single RGB images of one size.

    Raises:
        ValueError: With both shapes.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[:2] != (1, 3):
        raise ValueError(f"flow between {tuple(a.shape)} and {tuple(b.shape)}: give two (1, 3, height, width)")


@dataclass(frozen=True, kw_only=True)
class OpenCvDis:
    """DIS on 8-bit luma; the result does not depend on OpenCV's number of threads.

    Attributes:
        preset: OpenCV's; ``fast`` takes a fifth of the time of ``medium`` and is off by up to a fifth of a pixel.
    """

    preset: Literal["medium", "fast"] = "medium"
    weights_sha256: str | None = None
    official: bool = False

    @property
    def name(self) -> str:
        """``opencv_dis``, or ``opencv_dis_fast``: their numbers differ."""
        return "opencv_dis" if self.preset == "medium" else f"opencv_dis_{self.preset}"

    def __post_init__(self) -> None:
        if self.preset not in ("medium", "fast"):
            raise ValueError(f"preset={self.preset!r}: use medium or fast")
        if importlib.util.find_spec("cv2") is None:
            raise ValueError(
                "flow 'opencv_dis' needs the package opencv-python-headless (not installed): "
                "pip install 'longtake[flow]', or use 'torch_lk'."
            )

    def flow(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (1, 3, H, W) float in 0..255 -> (2, H, W) float32 in pixels, x then y.

        Raises:
            ValueError: If the shapes differ or a side is under 16 pixels.
        """
        check_pair(a, b)
        if min(a.shape[-2:]) < MIN_SIDE:
            raise ValueError(
                f"frames of {a.shape[-1]}x{a.shape[-2]} are too small for flow {self.name!r}: "
                f"use {MIN_SIDE} pixels a side or more, or 'torch_lk'."
            )
        pictures = [grey(image).round_().clamp_(0, 255).byte().numpy() for image in (a, b)]
        found = self._engine.calc(*pictures, None)
        return torch.from_numpy(found).permute(2, 0, 1).contiguous()

    @cached_property
    def _engine(self) -> Any:
        import cv2

        presets = {"medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM, "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST}
        return cv2.DISOpticalFlow_create(presets[self.preset])

    def __getstate__(self) -> dict[str, Any]:
        # OpenCV's objects do not travel between processes; the other side makes its own.
        return {key: value for key, value in vars(self).items() if key != "_engine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
