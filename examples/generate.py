"""A ten-second video from a text prompt, as any diffusers pipeline makes one."""

from diffusers.utils import export_to_video

from longtake import LongVideoPipeline

SECONDS = 10

pipe = LongVideoPipeline.from_pretrained("mini")
video = pipe(
    "a red circle bouncing quickly over a navy striped background",
    seconds=SECONDS,
    cache="attention_sink",
    seed=0,
).frames[0]
export_to_video(video, "generate.mp4", fps=pipe.family.fps)
print(f"generate.mp4: {len(video)} frames of {video.shape[2]}x{video.shape[1]}")
