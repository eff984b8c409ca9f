"""Stand-ins that need no weights: honest names, never official, comparable only with themselves."""

import importlib.util
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longtake.evaluation.backbones.base import Backbones
from longtake.evaluation.preprocessing import IMAGENET

MIN_SIDE = 16  # pixels: OpenCV's coarsest level needs a patch of 8 at half size
LUMA = (0.299, 0.587, 0.114)


def _grey(image: Tensor) -> Tensor:
    """(1, 3, H, W) float RGB in 0..255 -> (H, W) float32 luma (BT.601)."""
    height, width = image.shape[-2:]
    return (torch.tensor(LUMA) @ image.float().reshape(3, -1)).view(height, width)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[:2] != (1, 3):
        raise ValueError(f"flow between {tuple(a.shape)} and {tuple(b.shape)}: give two (1, 3, height, width)")


class _Classical:
    """Fills a role through its own interface, as the classes in ``backbones.base`` describe it."""

    weights_sha256 = None
    official = False


class _OpenCvDis(_Classical):
    """DIS on 8-bit luma; the result does not depend on OpenCV's number of threads."""

    name = "opencv_dis"

    def __init__(self) -> None:
        if importlib.util.find_spec("cv2") is None:
            raise ValueError(
                "flow 'opencv_dis' needs the package opencv-python-headless (not installed): "
                "pip install 'longtake[flow]', or use 'torch_lk'."
            )

    def flow(self, a: Tensor, b: Tensor) -> Tensor:
        _check_pair(a, b)
        if min(a.shape[-2:]) < MIN_SIDE:
            raise ValueError(
                f"frames of {a.shape[-1]}x{a.shape[-2]} are too small for flow {self.name!r}: "
                f"use {MIN_SIDE} pixels a side or more, or 'torch_lk'."
            )
        pictures = [_grey(image).round_().clamp_(0, 255).byte().numpy() for image in (a, b)]
        found = _dis(*pictures[0].shape).calc(*pictures, None)
        return torch.from_numpy(found).permute(2, 0, 1).contiguous()


@cache
def _dis(height: int, width: int) -> Any:
    """An engine for one size: after frames under 32 pixels it would use their finest level for larger ones, too."""
    import cv2

    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


COARSEST_SIDE = 8  # pixels: the pyramid ends where the shorter side would get smaller
HALVE_FROM = 96  # pixels: from this shorter side on, the finest level is half the size, which costs a quarter
DAMPING = 2.0  # squared grey levels: in what is flatter than sensor noise the motion stays what the coarser level said
MAX_STEP = 2.0  # pixels: a linear model of the picture says nothing about what is further away
WINDOW = 7  # pixels: side of the square window at every level
ITERATIONS = 3  # steps per level


class _TorchLucasKanade(_Classical):
    """Iterative, pyramidal, every pixel in a square window; blind to changes of brightness that a window shares.

    Source: Bouguet, "Pyramidal implementation of the Lucas Kanade feature tracker", 2000, with every pixel as a
    feature and windows freed of their means.
    """

    name = "torch_lk"

    def flow(self, a: Tensor, b: Tensor) -> Tensor:
        _check_pair(a, b)
        height, width = a.shape[-2:]
        with torch.no_grad():
            levels = _pyramid(torch.stack([_grey(a), _grey(b)])[:, None])
            found = torch.zeros(1, 2, *levels[-1].shape[-2:])
            for level, pair in enumerate(reversed(levels)):
                if level:
                    found = 2.0 * _enlarge(found, 2)
                found = _smooth(_refine(pair[:1], pair[1:], found), 3)
            scale = 2 if min(height, width) >= HALVE_FROM else 1
            if scale > 1:
                found = scale * _enlarge(found, scale)
        return found[0, :, :height, :width].contiguous()


def _refine(first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
    """Gauss-Newton steps on one level: all (1, C, h, w)."""
    slope = _slopes(first)
    x, y = slope[:, :1], slope[:, 1:]
    mean_x, mean_y, xx, xy, yy = _smooth(torch.cat([x, y, x * x, x * y, y * y], 1), WINDOW).split(1, 1)
    xx, xy, yy = xx - mean_x * mean_x + DAMPING, xy - mean_x * mean_y, yy - mean_y * mean_y + DAMPING
    inverse = 1.0 / (xx * yy - xy * xy)
    grid = _grid(first)
    size = torch.tensor([first.shape[-1], first.shape[-2]]).view(1, 1, 1, 2)
    best, least = flow, torch.full_like(first, torch.inf)
    for step_index in range(ITERATIONS + 1):
        where = grid + 2.0 * flow.permute(0, 2, 3, 1) / size
        moved = functional.grid_sample(second, where, padding_mode="border", align_corners=False)
        change = moved - first
        # What has left the frame has nothing to say about where it went.
        known = (where.abs() <= 1.0).all(-1)[:, None] * change
        products = torch.cat([change, change * change, known, x * known, y * known], 1)
        offset, error, mean, by_x, by_y = _smooth(products, WINDOW).split(1, 1)
        # A step may lead away from a match: each pixel keeps the best it has seen.
        error = error - offset * offset
        best = torch.where(error < least, flow, best)
        if step_index == ITERATIONS:
            break
        least = torch.minimum(error, least)
        by_x, by_y = by_x - mean_x * mean, by_y - mean_y * mean
        step = torch.cat([xy * by_y - yy * by_x, xy * by_x - xx * by_y], 1) * inverse
        flow = flow + step.clamp_(-MAX_STEP, MAX_STEP)
    return best


def _pyramid(pair: Tensor) -> list[Tensor]:
    shorter = min(pair.shape[-2:])
    halvings = max(0, (max(shorter, 1) // COARSEST_SIDE).bit_length() - 1)
    multiple = 2**halvings
    down, across = -pair.shape[-2] % multiple, -pair.shape[-1] % multiple
    levels = [functional.pad(pair, (0, across, 0, down), mode="replicate")]
    for _ in range(halvings):
        levels.append(functional.avg_pool2d(levels[-1], 2))
    return levels[1:] if shorter >= HALVE_FROM else levels


def _smooth(values: Tensor, side: int) -> Tensor:
    """Mean over a square window; the frame's edge has smaller windows."""
    half = side // 2
    height, width = values.shape[-2:]
    # Sums of shifted copies: several times faster than torch's pooling on a CPU.
    values = functional.pad(values, (half, half, half, half))
    values = sum((values[..., shift : shift + height, :] for shift in range(1, side)), values[..., :height, :])
    values = sum((values[..., shift : shift + width] for shift in range(1, side)), values[..., :width])
    return values.div_(_counts(height, half)[:, None] * _counts(width, half))


def _counts(length: int, half: int) -> Tensor:
    index = torch.arange(length)
    return (torch.clamp(index + half, max=length - 1) - torch.clamp(index - half, min=0) + 1).float()


def _slopes(image: Tensor) -> Tensor:
    """(1, 1, h, w) -> (1, 2, h, w): central differences, x then y."""
    wide = functional.pad(image, (1, 1, 1, 1), mode="replicate")
    x = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    y = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    return torch.cat([x, y], 1)


def _grid(image: Tensor) -> Tensor:
    """(1, h, w, 2): coordinates of each pixel for ``grid_sample``."""
    height, width = image.shape[-2:]
    y = (2 * torch.arange(height) + 1) / height - 1
    x = (2 * torch.arange(width) + 1) / width - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]


def _enlarge(flow: Tensor, factor: int) -> Tensor:
    return functional.interpolate(flow, scale_factor=factor, mode="bilinear", align_corners=False)


GRID = 64  # pixels a side of the reduced picture that layout and gradients are taken from: 8 x 8 cells of 8 x 8 pixels
NUM_COLOURS = 16
NUM_ORIENTATIONS = 9
NUM_CELLS = 8


class _HogHist(_Classical):
    """Colour histogram, colour layout and gradient orientations, in the DINO role.

    Sees where colours and edges are, not what they belong to. Three parts of equal weight: 3 x 16 colour bins; the
    picture pooled to 4 x 4, about mid-grey; 9 unsigned gradient orientations in 8 x 8 cells: 672 numbers.
    """

    name = "hog+hist"

    def encode(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}: give (batch, 3, height, width)")
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
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


class _LinearBlend(_Classical):
    """The mean of two frames, in the interpolation role: right where nothing moves, a double exposure elsewhere."""

    name = "linear_blend"

    def middle(self, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (a.float() + b.float())


def classical_backbones() -> Backbones:
    """Everything that runs without weights: dino, raft and amt.

    Optical flow is OpenCV's DIS where OpenCV is installed, else Lucas-Kanade in torch; the name says which.
    """
    has_opencv = importlib.util.find_spec("cv2") is not None
    return Backbones(
        {"dino": _HogHist(), "raft": _OpenCvDis() if has_opencv else _TorchLucasKanade(), "amt": _LinearBlend()}
    )
