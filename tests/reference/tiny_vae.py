"""The slow, obvious version of a TAEHV decoder: a whole video at once, layer by layer, straight from the tensors."""

import torch
from torch.nn import functional


def decode(weights, latents, *, with_memory=True):
    """(batch, frames, channels, height, width) latents to (batch, 1 + 4 (frames - 1), 3, ...) pixels in [0, 1].

    The layers in the published order: soft limit, convolution, ReLU; three times three memories, an upsampling, a
    growth in time, a convolution; ReLU, convolution. ``with_memory=False`` is the deliberately wrong variant.
    """
    batch = latents.shape[0]

    def conv(x, place, padding=1):
        name = f"decoder.{place}"
        return functional.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)

    def memory(x, place):
        frames = x.unflatten(0, (batch, -1))
        before = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], dim=1).flatten(0, 1)
        y = torch.cat([x, before if with_memory else torch.zeros_like(x)], dim=1)
        y = conv(conv(conv(y, f"{place}.conv.0").relu(), f"{place}.conv.2").relu(), f"{place}.conv.4")
        return (y + x).relu()

    x = conv(torch.tanh(latents.flatten(0, 1) / 3) * 3, 1).relu()
    for start in (3, 9, 15):
        for place in range(start, start + 3):
            x = memory(x, place)
        x = functional.interpolate(x, scale_factor=2, mode="nearest")
        width = x.shape[1]
        x = conv(x, f"{start + 4}.conv", padding=0)
        x = x.reshape(-1, width, *x.shape[2:])
        x = conv(x, start + 5)
    x = conv(x.relu(), 22)
    x = functional.pixel_shuffle(x, round((x.shape[1] / 3) ** 0.5))
    frames = x.unflatten(0, (batch, -1)).clamp(0, 1)
    return frames[:, frames.shape[1] // latents.shape[1] - 1 :]
