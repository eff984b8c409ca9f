"""Dense optical flow by Lucas-Kanade on a pyramid, in torch alone, in the RAFT role."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longtake.evaluation.backbones.dis import check_pair, grey

COARSEST_SIDE = 8
"""Pixels: the pyramid ends where the shorter side would get smaller; an eighth of the frame is one pixel there."""
HALVE_FROM = 96
"""Pixels: from this shorter side on, the finest level is half the size, which costs a quarter."""
DAMPING = 2.0
"""Squared grey levels: in what is flatter than sensor noise the motion stays what the coarser level said."""
MAX_STEP = 2.0
"""Pixels: a linear model of the picture says nothing about what is further away."""


@dataclass(frozen=True, kw_only=True)
class TorchLucasKanade:
    """Iterative, pyramidal, every pixel in a square window; blind to changes of brightness that a window shares.

    Attributes:
        window: Side of the window at every level, in pixels, odd.
        iterations: Steps per level.
    """

    name: str = "torch_lk"
    weights_sha256: str | None = None
    official: bool = False
    window: int = 7
    iterations: int = 3

    def __post_init__(self) -> None:
        if self.window < 3 or self.window % 2 == 0 or self.iterations < 1:
            raise ValueError(f"window={self.window}, iterations={self.iterations}: an odd window from 3, steps from 1")

    def flow(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (1, 3, H, W) float in 0..255 -> (2, H, W) float32 in pixels, x then y.

        Raises:
            ValueError: If the shapes differ.

        Source: Bouguet, "Pyramidal implementation of the Lucas Kanade feature tracker", 2000, with every pixel as a
            feature and windows freed of their means.
        """
        check_pair(a, b)
        height, width = a.shape[-2:]
        with torch.no_grad():
            levels = _pyramid(torch.stack([grey(a), grey(b)])[:, None])
            found = torch.zeros(1, 2, *levels[-1].shape[-2:])
            for level, pair in enumerate(reversed(levels)):
                if level:
                    found = 2.0 * _enlarge(found, 2)
                found = _smooth(self._refine(pair[:1], pair[1:], found), 3)
            scale = 2 if min(height, width) >= HALVE_FROM else 1
            if scale > 1:
                found = scale * _enlarge(found, scale)
        return found[0, :, :height, :width].contiguous()

    def _refine(self, first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
        """Gauss-Newton steps on one level: all (1, C, h, w)."""
        slope = _slopes(first)
        x, y = slope[:, :1], slope[:, 1:]
        mean_x, mean_y, xx, xy, yy = _smooth(torch.cat([x, y, x * x, x * y, y * y], 1), self.window).split(1, 1)
        xx, xy, yy = xx - mean_x * mean_x + DAMPING, xy - mean_x * mean_y, yy - mean_y * mean_y + DAMPING
        inverse = 1.0 / (xx * yy - xy * xy)
        grid = _grid(first)
        size = torch.tensor([first.shape[-1], first.shape[-2]]).view(1, 1, 1, 2)
        best, least = flow, torch.full_like(first, torch.inf)
        for step_index in range(self.iterations + 1):
            where = grid + 2.0 * flow.permute(0, 2, 3, 1) / size
            moved = functional.grid_sample(second, where, padding_mode="border", align_corners=False)
            change = moved - first
            # What has left the frame has nothing to say about where it went.
            known = (where.abs() <= 1.0).all(-1)[:, None] * change
            products = torch.cat([change, change * change, known, x * known, y * known], 1)
            offset, error, mean, by_x, by_y = _smooth(products, self.window).split(1, 1)
            # A step may lead away from a match: each pixel keeps the best it has seen.
            error = error - offset * offset
            best = torch.where(error < least, flow, best)
            if step_index == self.iterations:
                break
            least = torch.minimum(error, least)
            by_x, by_y = by_x - mean_x * mean, by_y - mean_y * mean
            step = torch.cat([xy * by_y - yy * by_x, xy * by_x - xx * by_y], 1) * inverse
            flow = flow + step.clamp_(-MAX_STEP, MAX_STEP)
        return best


def _pyramid(pair: Tensor) -> list[Tensor]:
    """(2, 1, H, W) -> finest first, each level half the one before; padded so that every level divides."""
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
    """How many pixels a window around each has."""
    index = torch.arange(length)
    return (torch.clamp(index + half, max=length - 1) - torch.clamp(index - half, min=0) + 1).float()


def _slopes(image: Tensor) -> Tensor:
    """(1, 1, h, w) -> (1, 2, h, w): central differences, x then y."""
    wide = functional.pad(image, (1, 1, 1, 1), mode="replicate")
    x = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    y = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    return torch.cat([x, y], 1)


def _grid(image: Tensor) -> Tensor:
    """(1, h, w, 2): where ``grid_sample`` finds each pixel."""
    height, width = image.shape[-2:]
    y = (2 * torch.arange(height) + 1) / height - 1
    x = (2 * torch.arange(width) + 1) / width - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]


def _enlarge(flow: Tensor, factor: int) -> Tensor:
    return functional.interpolate(flow, scale_factor=factor, mode="bilinear", align_corners=False)
