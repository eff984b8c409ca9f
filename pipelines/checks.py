"""What is refused before a rollout does any work."""

from collections.abc import Mapping
from typing import Any

from longtake.attention import BackendUnavailable, SparsePolicy
from longtake.attention.policies import POLICIES as SPARSE_POLICIES
from longtake.cache import POLICIES, CachePolicy
from longtake.models.sparse_attention import AttentionSetting
from longtake.models.upstream import check_numerics
from longtake.pipelines.prompts import check_event
from longtake.samplers import SAMPLERS, Sampler


def check_blocks(num_frames: int, frames_per_block: int, first_block_frames: int | None, num_given: int) -> None:
    """Refuse lengths that are no whole blocks.

    Args:
        num_frames: Latent frames to generate.
        frames_per_block: Latent frames denoised together.
        first_block_frames: Frames of the very first block, where it differs.
        num_given: Latent frames given.

    Raises:
        ValueError: With the nearest length that is.
    """
    for name, value in (("num_frames", num_frames), ("frames_per_block", frames_per_block)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    if first_block_frames is not None and first_block_frames < 1:
        raise ValueError(f"first_block_frames={first_block_frames} must be 1 or more, or None.")
    first = first_block_frames or frames_per_block
    if num_given and (num_given < first or (num_given - first) % frames_per_block):
        raise ValueError(
            f"initial_latents has {num_given} frames, which is no whole number of blocks: "
            f"use {first} frames plus a multiple of {frames_per_block}."
        )
    total = num_given + num_frames
    if total < first or (total - first) % frames_per_block:
        nearest = first + max(0, round((total - first) / frames_per_block)) * frames_per_block
        raise ValueError(
            f"num_frames={num_frames} is no whole number of blocks of {frames_per_block} frames "
            f"(first block {first}, {num_given} given): use {max(nearest - num_given, frames_per_block)}."
        )


def check_policy(policy: CachePolicy, sampler: Sampler, *, has_pixels: bool) -> None:
    """Refuse a policy that cannot serve the sampler, or that needs a VAE where there is none.

    Raises:
        ValueError: With the policies that can, or the remedy.
    """
    if sampler.num_window_blocks > 1 and not policy.takes_windows:
        known = [name for name, kind in POLICIES.items() if kind.takes_windows is True]
        raise ValueError(
            f"cache policy {policy.name!r} serves one block at a time, sampler {sampler.name!r} denoises "
            f"{sampler.num_window_blocks} together: use another sampler, or one of the policies {', '.join(known)}."
        )
    if policy.needs_vae and not has_pixels:
        raise ValueError(
            f"cache policy {policy.name!r} pools pixels with these settings and needs a VAE: "
            "give pixels, or use LongVideoPipeline."
        )


def checked_attention(policy: CachePolicy, settings: SparsePolicy | Mapping[str, Any] | str) -> AttentionSetting:
    """Make the attention of a rollout and refuse what would fail in it.

    Raises:
        ValueError: If a name, a field or a value is unknown or does not fit the cache, or the named backend cannot run
            on this machine.
    """
    setting = AttentionSetting(settings)
    check_attention(policy, setting)
    try:
        setting.check_backend()
    except BackendUnavailable as error:
        raise ValueError(str(error)) from error
    return setting


def check_attention(policy: CachePolicy, attention: AttentionSetting) -> None:
    """Refuse sparse attention over a cache that weights its tokens, breaks frames or gives heads different ones.

    Raises:
        ValueError: With the remedy.
    """
    if policy.weighs_tokens and not attention.is_dense:
        raise ValueError(
            f"cache policy {policy.name!r} weights its tokens with these settings, which attention "
            f"{attention.policy.name!r} does not take: use attention 'dense', or another cache policy."
        )
    if policy.splits_heads and not attention.is_dense and not attention.policy.is_static:
        raise ValueError(
            f"cache policy {policy.name!r} gives heads different tokens, and attention {attention.policy.name!r} "
            "chooses by the tokens of all heads: use one that looks at positions alone, such as 'radial'."
        )
    if policy.breaks_frames and not attention.is_dense and attention.policy.needs_frames:
        known = [name for name, kind in SPARSE_POLICIES.items() if not kind.needs_frames]
        raise ValueError(
            f"cache policy {policy.name!r} reads tokens that are no whole frames with these settings, which attention "
            f"{attention.policy.name!r} has no place for: use another cache policy, or one of {', '.join(known)}."
        )


def check_rounding(sampler: Sampler, numerics: str) -> None:
    """Refuse the published rounding with a sampler that has none of its own.

    Raises:
        ValueError: With the samplers that have, or the names of the numerics.
    """
    check_numerics(numerics)
    if numerics == "upstream" and not sampler.is_renoising:
        known = [name for name, kind in SAMPLERS.items() if kind.is_renoising]
        raise ValueError(
            f"numerics='upstream' rounds between the steps as the published re-noising loop does, which sampler "
            f"{sampler.name!r} is not: use numerics 'native', or one of the samplers {', '.join(known)}."
        )


def check_switch(policy: CachePolicy, sampler: Sampler, event: str) -> None:
    """Refuse a prompt event that the policy does not know, or that the sampler has no moment for.

    Raises:
        ValueError: With those that there are.
    """
    check_event(policy, event)
    if event != "keep" and sampler.num_window_blocks > 1:
        raise ValueError(
            f"sampler {sampler.name!r} denoises blocks of both prompts together, so there is no moment for "
            f"the prompt event {event!r}: use 'keep', or another sampler."
        )
