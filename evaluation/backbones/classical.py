"""Stand-ins that need no weights: honest names, never official, comparable only with themselves."""

import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longtake.evaluation.backbones.base import Backbones
from longtake.evaluation.backbones.dis import OpenCvDis
from longtake.evaluation.backbones.lucas_kanade import TorchLucasKanade
from longtake.evaluation.transforms import IMAGENET_MEAN, IMAGENET_STD

GRID = 64
"""Pixels a side of the reduced picture that layout and gradients are taken from: 8 x 8 cells of 8 x 8 pixels."""
NUM_COLOURS = 16
NUM_ORIENTATIONS = 9
NUM_CELLS = 8


@dataclass(frozen=True, kw_only=True)
class HogHist:
    """Colour histogram, colour layout and gradient orientations, in the DINO role.

    Sees where colours and edges are, not what they belong to. Three parts of equal weight: 3 x 16 colour bins; the
    picture pooled to 4 x 4, about mid-grey; 9 unsigned gradient orientations in 8 x 8 cells.
    """

    name: str = "hog+hist"
    weights_sha256: str | None = None
    official: bool = False

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float, after the DINO transform -> (B, 672) float32; its length is never 0.

        Raises:
            ValueError: If the shape is another.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}: give (batch, 3, height, width)")
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        small = functional.adaptive_avg_pool2d(images.float(), GRID) * std + mean
        layout = functional.adaptive_avg_pool2d(small, 4).flatten(1) - 0.5
        parts = [_colours(small), layout, _orientations(small)]
        return torch.cat([functional.normalize(part, dim=1, eps=1e-6) for part in parts], dim=1)


def _colours(small: Tensor) -> Tensor:
    """(B, 3, G, G) in 0..1 -> (B, 48): the square root of each bin's share, so that no large area drowns the rest."""
    bins = (small * NUM_COLOURS).long().clamp_(0, NUM_COLOURS - 1)
    offsets = NUM_COLOURS * torch.arange(3 * len(small)).view(-1, 3, 1, 1)
    counts = torch.bincount((bins + offsets).flatten(), minlength=3 * NUM_COLOURS * len(small))
    return counts.view(len(small), -1).float().div_(GRID * GRID).sqrt_()


def _orientations(small: Tensor) -> Tensor:
    """(B, 3, G, G) -> (B, 9 * 64): gradient magnitude by orientation in each cell."""
    luma = functional.pad(small.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = luma[:, 0, 1:-1, 2:] - luma[:, 0, 1:-1, :-2]
    down = luma[:, 0, 2:, 1:-1] - luma[:, 0, :-2, 1:-1]
    strength = torch.hypot(across, down)
    share = torch.atan2(down, across) / math.pi
    bins = ((share % 1.0) * NUM_ORIENTATIONS).long().clamp_(0, NUM_ORIENTATIONS - 1)
    size = GRID // NUM_CELLS
    cells = torch.arange(GRID) // size
    cell = cells[:, None] * NUM_CELLS + cells[None]
    index = (bins * NUM_CELLS**2 + cell).flatten(1)
    out = torch.zeros(len(small), NUM_ORIENTATIONS * NUM_CELLS**2)
    return out.scatter_add_(1, index, strength.flatten(1)).sqrt_()


@dataclass(frozen=True, kw_only=True)
class LinearBlend:
    """The mean of two frames, in the interpolation role: right where nothing moves, a double exposure elsewhere."""

    name: str = "linear_blend"
    weights_sha256: str | None = None
    official: bool = False

    def middle(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (1, 3, H, W) float -> their mean."""
        return 0.5 * (a.float() + b.float())


def classical_backbones() -> Backbones:
    """Everything that runs without weights: dino, raft and amt.

    Optical flow is OpenCV's DIS where OpenCV is installed, else Lucas-Kanade in torch; the name says which.
    """
    has_opencv = importlib.util.find_spec("cv2") is not None
    return Backbones(
        {"dino": HogHist(), "raft": OpenCvDis() if has_opencv else TorchLucasKanade(), "amt": LinearBlend()}
    )
