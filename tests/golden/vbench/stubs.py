"""Deterministic stand-ins for the learned backbones, written for this comparison (no weights).

They are deliberately trivial: every number they return can be recomputed in a few lines, so that
what a comparison tests is the METRIC code around the backbone (sampling, resize, normalisation,
formula, aggregation), never the backbone.  All maths in float32 torch on CPU.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class StubDino(nn.Module):
    """(B,3,H,W) -> (B,48): adaptive average pool to 4x4, flattened (channel-major)."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, (4, 4)).flatten(1)


class StubDino2(nn.Module):
    """(B,3,H,W) -> (B,27): adaptive average pool to 3x3 (used for the clip-to-clip branch)."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, (3, 3)).flatten(1)


class StubClip(nn.Module):
    """encode_image: (B,3,224,224) -> (B,768), adaptive average pool to 16x16, flattened.
    encode_text / __call__: see below.  Text feature k of string s: sum_j ord(s_j)*cos((j+1)(k+1))/100."""

    def encode_image(self, x):
        return F.adaptive_avg_pool2d(x, (16, 16)).flatten(1)

    def __call__(self, image, text):  # appearance_style: logits are 100 * cosine
        i = F.normalize(self.encode_image(image), dim=-1)
        t = F.normalize(text, dim=-1)
        li = 100.0 * i @ t.T
        return li, li.T


def text_vec(s, dim):
    k = torch.arange(1, dim + 1, dtype=torch.float64)
    v = torch.zeros(dim, dtype=torch.float64)
    for j, ch in enumerate(s):
        v += ord(ch) * torch.cos((j + 1) * k) / 100.0
    return v.float()[None]


def stub_aesthetic_head():
    """nn.Linear(768,1): weight_i = sin(i+1)/2 (i from 0), bias 5."""
    m = nn.Linear(768, 1)
    with torch.no_grad():
        m.weight.copy_(torch.sin(torch.arange(1, 769, dtype=torch.float64)).float()[None] / 2)
        m.bias.fill_(5.0)
    return m.eval()


class StubMusiq(nn.Module):
    """(1,3,h,w) in [0,1] -> 20 + 200*std over all values (unbiased=False) + 1e-3*(h+w)."""

    def forward(self, x):
        return 20.0 + 200.0 * x.std(unbiased=False) + 1e-3 * (x.shape[-1] + x.shape[-2])


class StubRaft(nn.Module):
    """flow = (d/8, d/16) with d = mean over channels of (image2 - image1), images in 0..255."""

    def forward(self, image1, image2, iters=20, test_mode=True):
        d = (image2 - image1).mean(dim=1)
        return None, torch.stack([d / 8.0, d / 16.0], dim=1)


class StubAmt(nn.Module):
    """Frame interpolation = plain average of the two neighbours (values in [0,1])."""

    def forward(self, in_0, in_1, embt, scale_factor=1.0, eval=True):
        return {"imgt_pred": 0.5 * (in_0 + in_1)}


class StubViclip:
    """encode_vision: (1,8,3,224,224) -> (1,48), mean over the 8 frames of a 4x4 average pool.
    encode_text: text_vec(s, 48)."""

    def encode_vision(self, frames, test=True):
        b, t = frames.shape[:2]
        return F.adaptive_avg_pool2d(frames.flatten(0, 1), (4, 4)).flatten(1).view(b, t, -1).mean(1)

    def encode_text(self, s):
        return text_vec(s, 48)


class StubDreamsim(nn.Module):
    """embed: (B,3,224,224) in [0,1] -> (B,75), adaptive average pool to 5x5, minus 0.4."""

    def embed(self, x):
        return F.adaptive_avg_pool2d(x, (5, 5)).flatten(1) - 0.4
