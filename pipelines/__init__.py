"""The rollout: text to blocks to latents to pixels to a file."""

from longtake.pipelines.rollout import Block, LatentRollout, PromptSwitch, rollout_latents

__all__ = ["Block", "LatentRollout", "PromptSwitch", "rollout_latents"]
