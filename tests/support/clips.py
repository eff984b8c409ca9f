"""Small video files for tests of evaluations."""

import numpy as np

from longtake.pipelines.video_file import VideoFormat, VideoWriter


def write_clip(path, frames=None, *, fps=8, num_frames=5, seed=0):
    """Write frames (F, H, W, 3) uint8, or noise of 32 x 32 pixels; returns the path, whose folder is made."""
    if frames is None:
        frames = np.random.default_rng(seed).integers(0, 256, (num_frames, 32, 32, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"height": frames.shape[1], "width": frames.shape[2]}
    with VideoWriter(path, video_format=VideoFormat(**size, fps=fps, crf=12, threads=1)) as writer:
        writer.write(frames)
    return path
