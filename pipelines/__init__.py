"""The rollout: text to blocks to latents to pixels to a file.

Names are loaded when they are first used: run folders and video files are handled without waiting for diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtake.pipelines.conditioning import make_clip
    from longtake.pipelines.long_video import LongVideoPipeline, LongVideoPipelineOutput, VideoBlock, VideoRollout
    from longtake.pipelines.rollout import Block, LatentRollout, rollout_latents
    from longtake.pipelines.settings import PromptSwitch, RolloutSettings, VideoSettings

_MODULES = {
    "conditioning": ("make_clip",),
    "long_video": ("LongVideoPipeline", "LongVideoPipelineOutput", "VideoBlock", "VideoRollout"),
    "rollout": ("Block", "LatentRollout", "rollout_latents"),
    "settings": ("PromptSwitch", "RolloutSettings", "VideoSettings"),
}

__all__ = [
    "Block",
    "LatentRollout",
    "LongVideoPipeline",
    "LongVideoPipelineOutput",
    "PromptSwitch",
    "RolloutSettings",
    "VideoBlock",
    "VideoRollout",
    "VideoSettings",
    "make_clip",
    "rollout_latents",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"longtake.pipelines.{module}"), name)
    raise AttributeError(f"module 'longtake.pipelines' has no attribute {name!r}")
