"""The rollout: text to blocks to latents to pixels to a file.

Names are loaded when they are first used: run folders and video files are handled without waiting for diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtake.pipelines.clips import make_clip
    from longtake.pipelines.latents import rollout_latents
    from longtake.pipelines.long_video import LongVideoPipeline, LongVideoPipelineOutput
    from longtake.pipelines.prompts import PromptSwitch
    from longtake.pipelines.rollout import Block, LatentRollout
    from longtake.pipelines.take import Chunk, TakeSession

__all__ = [
    "Block",
    "Chunk",
    "LatentRollout",
    "LongVideoPipeline",
    "LongVideoPipelineOutput",
    "PromptSwitch",
    "TakeSession",
    "make_clip",
    "rollout_latents",
]

_MODULES = {
    "Block": "rollout",
    "Chunk": "take",
    "LatentRollout": "rollout",
    "LongVideoPipeline": "long_video",
    "LongVideoPipelineOutput": "long_video",
    "PromptSwitch": "prompts",
    "TakeSession": "take",
    "make_clip": "clips",
    "rollout_latents": "latents",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'longtake.pipelines' has no attribute {name!r}")
    return getattr(import_module(f"longtake.pipelines.{_MODULES[name]}"), name)
