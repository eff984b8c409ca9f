"""Transforms against slow versions in float64, and rules of sampling that hold for every length."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.evaluation.preprocessing import (
    clip_ranges,
    clip_transform,
    dino_transform,
    dinov2_transform,
    dreamsim_transform,
    middle,
    musiq_transform,
    pad_to_multiple,
    stride_for_8fps,
    to_tensor,
    unpad,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SHAPES = [(40, 70), (70, 40), (33, 33), (61, 90)]


def linear(x):
    return max(0.0, 1.0 - abs(x))


def cubic(x, a):
    """Keys' kernel, and 0 beyond two pixels."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights(size, target, *, kernel, antialias):
    """(target, size): what each output pixel takes from each input pixel, centres aligned, edges repeated."""
    scale = size / target
    stretch = max(scale, 1.0) if antialias else 1.0
    support = (1 if kernel == "bilinear" else 2) * stretch
    table = np.zeros((target, size))
    for index in range(target):
        centre = (index + 0.5) * scale - 0.5
        for source in range(math.floor(centre - support) - 1, math.ceil(centre + support) + 2):
            distance = (source - centre) / stretch
            # torch uses Pillow's a = -0.5 with antialiasing, and -0.75 without.
            share = linear(distance) if kernel == "bilinear" else cubic(distance, -0.5 if antialias else -0.75)
            if antialias and not 0 <= source < size:
                continue
            table[index, min(max(source, 0), size - 1)] += share
    return table / table.sum(1, keepdims=True)


def resized(frame, size, kernel, antialias=False, loader="float"):
    """(H, W, 3) -> (h, w, 3) in float64."""
    out = frame.astype(np.float64)
    for axis in (0, 1):
        table = weights(frame.shape[axis], size[axis], kernel=kernel, antialias=antialias)
        out = np.moveaxis(np.tensordot(table, out, (1, axis)), 0, axis)
    return np.rint(np.clip(out, 0, 255)) if loader == "uint8" else out


def cropped(frame, side):
    top, left = (round((length - side) / 2) for length in frame.shape[:2])
    return frame[top : top + side, left : left + side]


def normalised(frame, statistics):
    mean, std = (np.array(values) for values in statistics)
    return ((frame / 255 - mean) / std).transpose(2, 0, 1)


def shorter_to(frame, side):
    height, width = frame.shape[:2]
    return (side, side * width // height) if height <= width else (side * height // width, side)


def frames_of(shape, num_frames=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, *shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("transform", "slow", "allowed"),
    [
        (dino_transform, lambda f: normalised(resized(f, shorter_to(f, 24), "bilinear"), IMAGENET), 5e-5),
        (clip_transform, lambda f: normalised(cropped(resized(f, shorter_to(f, 24), "bicubic"), 24), CLIP), 5e-5),
        # A value that lies half-way between two whole numbers may round either way.
        (
            partial(clip_transform, loader="uint8"),
            lambda f: normalised(cropped(resized(f, shorter_to(f, 24), "bicubic", loader="uint8"), 24), CLIP),
            1 / 255 / 0.22,
        ),
        (dreamsim_transform, lambda f: resized(f, (24, 24), "bicubic", True).transpose(2, 0, 1) / 255, 1e-5),
    ],
    ids=["dino", "clip", "viclip", "dreamsim"],
)
def test_transforms(shape, transform, slow, allowed):
    frames = frames_of(shape)
    found = transform(frames, side=24)
    assert found.dtype == torch.float32
    for have, frame in zip(found, frames, strict=True):
        error = np.abs(have.numpy() - slow(frame))
        assert error.max() <= allowed and np.mean(error > 5e-5) < 0.02


def test_wrong_filters_would_be_seen():
    """Neighbouring choices (truncating, smoothing, another cubic) are orders of magnitude beyond the tolerance."""
    frame = frames_of((61, 90), 1)[0]
    size = shorter_to(frame, 24)
    right = resized(frame, size, "bilinear")
    assert np.abs(resized(frame, size, "bilinear", antialias=True) - right).mean() > 5
    assert np.abs(resized(frame, size, "bicubic") - right).mean() > 1
    assert np.mean(np.floor(right) != np.rint(right)) > 0.3


@pytest.mark.parametrize("shape", SHAPES)
def test_dinov2(shape):
    frames = frames_of(shape, 1)
    large = resized(frames[0], shorter_to(frames[0], 256), "bicubic", True)
    np.testing.assert_allclose(
        dinov2_transform(frames)[0].numpy(), normalised(cropped(large, 224), IMAGENET), atol=5e-5
    )


def test_the_loaders_differ_where_bicubic_overshoots():
    """VBench's float loader leaves values outside 0..255, its uint8 loader does not."""
    frames = np.zeros((1, 40, 60, 3), np.uint8)
    frames[:, :, 30:] = 255
    black, white = (normalised(np.full((1, 1, 3), value), CLIP) - sign for value, sign in ((0, 1e-3), (255, -1e-3)))
    by_float, by_uint8 = (clip_transform(frames, side=90, loader=loader)[0].numpy() for loader in ("float", "uint8"))
    assert (by_float < black).any() and (by_float > white).any()
    assert (by_uint8 >= black).all() and (by_uint8 <= white).all()


@pytest.mark.parametrize(
    ("mode", "size"),
    # 512/998 in floating point times 998 is just under 512, and VBench cuts: 511.
    [("longer", (295, 511)), ("shorter", (512, 887)), ("shorter_centercrop", (512, 512)), ("None", (576, 998))],
)
def test_musiq_modes(mode, size):
    frames = frames_of((576, 998), 1)
    found = musiq_transform(frames, mode=mode)
    assert tuple(found.shape[-2:]) == size and found.min() >= 0 and found.max() <= 1
    if mode == "None":
        np.testing.assert_array_equal(found[0].numpy(), to_tensor(frames)[0].numpy() / np.float32(255))
    small = frames_of((300, 512), 1)
    assert musiq_transform(small, mode=mode).shape[-2:] == (300, 512)


def test_frames_are_independent_of_their_piece():
    frames = frames_of((50, 81), 5)
    for transform in (dino_transform, clip_transform, dinov2_transform, dreamsim_transform, musiq_transform):
        whole = transform(frames)
        assert torch.equal(whole, torch.cat([transform(frames[:2]), transform(frames[2:])]))


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 8, 16]))
def test_padding_repeats_edges_and_is_undone(height, width, multiple):
    images = torch.rand(1, 2, height, width)
    padded, padding = pad_to_multiple(images, multiple)
    left, right, top, bottom = padding
    assert padded.shape[-2] % multiple == padded.shape[-1] % multiple == 0
    assert 0 <= right - left <= 1 and 0 <= bottom - top <= 1 and left + right < multiple and top + bottom < multiple
    assert torch.equal(unpad(padded, padding), images)
    assert torch.equal(padded[..., 0, 0], images[..., 0, 0]) and torch.equal(padded[..., -1, -1], images[..., -1, -1])


@pytest.mark.parametrize("frames", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)])
def test_wrong_input_is_refused(frames):
    with pytest.raises(ValueError, match="give uint8"):
        dino_transform(frames)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 4000), st.sampled_from([1, 8, 12.5, 16, 23.976, 24, 29.97, 30, 60]), st.sampled_from([1, 2, 10]))
def test_clips_cover_every_frame_at_one_length(num_frames, fps, seconds):
    clips = clip_ranges(num_frames, fps, seconds)
    covered = {frame for start, length in clips for frame in range(start, start + length)}
    assert covered == set(range(num_frames))
    assert {length for _, length in clips} == {min(num_frames, int(fps) * seconds)}
    assert [start for start, _ in clips] == sorted({start for start, _ in clips})
    # The borrowed clip is the last one only.
    assert all(start == index * int(fps) * seconds for index, (start, _) in enumerate(clips[:-1]))


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 32), st.integers(1, 4000))
def test_middle_is_the_middle_of_equal_stretches(num_samples, num_frames):
    count = min(num_samples, num_frames)
    # Rounded as numpy rounds it, which is what VBench cuts at: 117 may come out as 116.99.
    edges = [int(part * (num_frames / count)) for part in range(count)] + [num_frames]
    expected = [(edges[i] + edges[i + 1] - 1) // 2 for i in range(count)]
    assert middle(num_samples, num_frames) == expected + [expected[-1]] * (num_samples - count)


def test_a_half_stride_goes_to_the_even_neighbour():
    fps = [1, 8, 11, 12, 16, 20, 24, 25, 28, 30, 60]
    strides = [stride_for_8fps(rate) for rate in fps]
    assert strides == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 8]
    # Rounding halves up is the mistake to make here.
    assert strides != [max(1, int(rate / 8 + 0.5)) for rate in fps]
