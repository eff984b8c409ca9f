"""A minute of video written block by block, with a new prompt halfway; memory does not grow with length."""

from pathlib import Path

from longtake import LongVideoPipeline
from longtake.pipelines.video_file import VideoFormat, VideoWriter

SECONDS = 60

pipe = LongVideoPipeline.from_pretrained("mini")
family = pipe.family
session = pipe.start("a red circle bouncing quickly over a navy striped background", seconds=SECONDS, seed=0)
video_format = VideoFormat(height=family.height, width=family.width, fps=family.fps, scale=4)

with VideoWriter(Path("stream.mp4"), video_format=video_format) as writer:
    for chunk in session:
        writer.write(chunk.uint8()[0])  # the file on disk is playable from the first second on
        if chunk.index == session.num_blocks // 2:
            session.change_prompt("a blue circle bouncing quickly over a navy striped background")
        print(f"block {chunk.index}: {chunk.frames.shape[1]} frames, cache {chunk.num_cache_bytes / 2**20:.1f} MB")
