"""Trivial networks for the metrics' tests, and synthetic videos."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from longtake.evaluation.backbones import Backbones
from longtake.evaluation.metric import VideoInfo


@dataclass(frozen=True)
class Stub:
    name: str
    official: bool = False
    weights_sha256: str | None = None
    cells: int = 4

    def encode(self, images):
        return adaptive_avg_pool2d(images, self.cells).flatten(1)

    def rate(self, features):
        return 5.0 + features[:, :7].sum(dim=1, keepdim=True)

    def score(self, image):
        return float(20 + 200 * image.std() + 1e-3 * (image.shape[-1] + image.shape[-2]))

    def flow(self, a, b):
        difference = (b - a).mean(dim=1)[0]
        return torch.stack([difference / 8, difference / 16])

    def middle(self, a, b):
        return 0.5 * (a + b)

    def encode_video(self, clips):
        return adaptive_avg_pool2d(clips.flatten(0, 1), 4).flatten(1).view(*clips.shape[:2], -1).mean(1)

    def encode_text(self, text):
        return torch.cos(torch.arange(48.0) * sum(map(ord, text)))[None]


ROLES = ("dino", "clip", "aesthetic_clip", "aesthetic_head", "musiq", "raft", "amt", "viclip", "dinov2", "dreamsim")


def stubs(*, official=False, without=()):
    """All roles but some; the encoders differ from each other."""
    found = {
        role: Stub(f"stub_{role}", official=official, cells=3 + index)
        for index, role in enumerate(ROLES)
        if role not in without
    }
    return Backbones(found)


def moving_squares(num_frames, height=24, width=36, seed=0):
    """(F, H, W, 3) uint8: squares of three colours on a texture, moving."""
    y, x = np.mgrid[0:height, 0:width]
    texture = 110 + 35 * np.cos(2 * np.pi * (x[..., None] / width * np.arange(1, 4) + y[..., None] / height) + seed)
    video = np.repeat(texture[None].round().astype(np.uint8), num_frames, axis=0)
    for index in range(num_frames):
        for square, colour in enumerate(((250, 30, 30), (30, 250, 60), (40, 60, 250))):
            top = (3 + 7 * square + index * (1 - square)) % (height - 6)
            left = (5 + 9 * square + index * (2 + square)) % (width - 6)
            video[index, top : top + 6, left : left + 6] = colour
    return video


def info(frames, fps=4.0, prompt="a red square", name="v", **about):
    size = {"num_frames": len(frames), "height": frames.shape[1], "width": frames.shape[2]}
    return VideoInfo(id=name, fps=fps, prompt=prompt, **size, **about)


def scores(metrics, frames, cuts=(), **about):
    """Scores of all metrics, the video pushed in pieces that end at ``cuts`` and are overwritten once pushed."""
    found = {}
    for metric in metrics:
        meter = metric.start(info(frames, **about))
        for piece in np.split(frames, sorted(set(cuts))):
            if len(piece):
                buffer = piece.copy()
                meter.push(buffer)
                buffer[:] = 0
        found.update(meter.finish())
    return found
