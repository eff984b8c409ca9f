"""How much memory a policy takes in a rollout, without making one."""

from dataclasses import replace

import torch

from longtake.cache.base import CachePolicy, Geometry
from longtake.cache.simulation import simulate

MAX_BLOCKS = 600  # at 4 frames a block ten minutes of video
STEADY_BLOCKS = 12  # without a change: the rest is alike


def num_cache_bytes(policy: CachePolicy, geometry: Geometry) -> int:
    """Most bytes that a cache takes in a rollout, stored tokens and read sets, played on the meta device.

    Args:
        policy: What to keep and read.
        geometry: Of the rollout; ``max_frames`` decides for a policy that grows.

    Raises:
        ValueError: If the policy grows and the length of the rollout is not known.
    """
    meta = replace(geometry, device=torch.device("meta"))
    num_blocks = MAX_BLOCKS
    if geometry.max_frames is not None:
        num_blocks = min(num_blocks, -(-geometry.max_frames // geometry.frames_per_block))
    layers = geometry.num_layers if policy.start(meta).keeps_read_sets else 1
    per_token = 2 * layers * geometry.batch_size * geometry.num_heads * geometry.head_dim * geometry.dtype.itemsize
    stored = read = steady = 0
    for block in simulate(policy, meta, num_blocks, layer=geometry.num_layers - 1):
        passes = [p for p in (block.denoise, block.commit) if p is not None]
        tokens = max(p.num_tokens for p in passes) + block.num_frames * geometry.tokens_per_frame
        grows = block.stats.num_bytes > stored or tokens > read
        stored, read, steady = max(stored, block.stats.num_bytes), max(read, tokens), 0 if grows else steady + 1
        if steady == STEADY_BLOCKS:
            break
    if steady < STEADY_BLOCKS and geometry.max_frames is None:
        raise ValueError(
            f"cache policy {policy.name!r} grows with the video: how much it takes depends on its length (max_frames)."
        )
    return stored + int(read * per_token)
