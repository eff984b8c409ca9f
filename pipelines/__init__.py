"""The rollout: text to blocks to latents to pixels to a file."""

from longtake.pipelines.long_video import LongVideoPipeline, LongVideoPipelineOutput
from longtake.pipelines.rollout import Block, LatentRollout, PromptSwitch, rollout_latents
from longtake.pipelines.take import Chunk, TakeSession

__all__ = [
    "Block",
    "Chunk",
    "LatentRollout",
    "LongVideoPipeline",
    "LongVideoPipelineOutput",
    "PromptSwitch",
    "TakeSession",
    "rollout_latents",
]
