"""VBench's formulas over whole videos, slowly: plain loops in float64 over frames that are all in memory."""

import numpy as np


def flickering(frames):
    differences = [np.abs(b.astype(float) - a.astype(float)).mean() for a, b in zip(frames, frames[1:], strict=False)]
    return (255.0 - np.mean(differences)) / 255.0


def cosine(a, b):
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def consistency(features):
    terms = []
    for index in range(1, len(features)):
        to_previous = max(0.0, cosine(features[index - 1], features[index]))
        to_first = max(0.0, cosine(features[0], features[index]))
        terms.append((to_previous + to_first) / 2)
    return float(np.mean(terms))


def smoothness(frames, middle):
    """``middle`` takes two (H, W, 3) images in 0..1, not padded."""
    kept, dropped = frames[0::2], frames[1::2]
    errors = []
    for index in range(len(kept) - 1):
        predicted = middle(kept[index] / np.float32(255), kept[index + 1] / np.float32(255))
        predicted = np.clip(predicted * np.float32(255), 0, 255).astype(np.uint8)
        errors.append(np.abs(dropped[index].astype(float) - predicted.astype(float)).mean())
    return (255.0 - np.mean(errors)) / 255.0


def dynamic(frames, fps, flow):
    """``flow`` takes two (H, W, 3) images in 0..255, padded to multiples of 8; gives (is dynamic, pairs' flows)."""
    sampled = frames[:: max(1, round(fps / 8))]
    height, width = frames.shape[1:3]
    down, across = -height % 8, -width % 8
    edges = ((0, 0), (down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
    sampled = np.pad(sampled.astype(np.float32), edges, mode="edge")
    scores = []
    for a, b in zip(sampled, sampled[1:], strict=False):
        x, y = flow(a, b)
        speeds = np.sort(np.sqrt(x.astype(float) ** 2 + y.astype(float) ** 2).ravel())[::-1]
        scores.append(float(speeds[: int(0.05 * speeds.size)].mean()))
    threshold = 6.0 * min(height, width) / 256.0
    count = 0
    for score in scores:
        count += score > threshold
        if count >= round(4 * (len(sampled) / 16)):
            return True, scores
    return False, scores


def middle_of_eight(num_frames):
    edges = np.linspace(0, num_frames, min(8, num_frames) + 1).astype(int)
    indices = [(a + b - 1) // 2 for a, b in zip(edges, edges[1:], strict=False)]
    return indices + [indices[-1]] * (8 - len(indices))


def clips(num_frames, fps):
    """(start, end) of each two-second clip."""
    length = 2 * int(fps)
    if num_frames < length:
        return [(0, num_frames)]
    found = [(index * length, (index + 1) * length) for index in range(num_frames // length)]
    rest = num_frames % length
    if rest:
        borrowed = length - rest
        found.append(((num_frames // length) * length - borrowed, num_frames))
    return found


def official_clip_to_clip(clip_file, by_video):
    """The clip-to-clip value that the official tool finds for a clip, by the clip's file name.

    It takes the name up to the first underscore for the video's name. A video whose own name has an underscore is
    therefore never found, counts as 0, and its drift is not counted: exported names have none.
    """
    return by_video.get(f"{clip_file.split('_')[0]}.mp4", 0.0)
