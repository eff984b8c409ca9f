"""How sparse each block of a rollout is: the later, the sparser."""

import math
from functools import cache


@cache
def growth_schedule(
    num_frames: int, frames_per_block: int, *, sparsity: float, base_sparsity: float, num_context_frames: int | None
) -> tuple[float, ...]:
    """Chunk-aware growth: the sparsity of every block of a video, whose mean over all that is read is ``sparsity``.

    Args:
        num_frames: Latent frames of the video.
        frames_per_block: Latent frames denoised together.
        sparsity: Share of the key blocks that is left out, over all blocks of the video but the first.
        base_sparsity: What the last blocks of an endless video come to.
        num_context_frames: Most frames that are read; None: all.

    Returns:
        A number from 0 to below 1 for every block of the video; the first is 0.

    Source: Light Forcing, arXiv:2602.04789; the released code takes 1 / sqrt(frames so far) for the noise of a block.
    """
    ends = [(index + 1) * frames_per_block for index in range(1, num_frames // frames_per_block)]
    lengths = [end if num_context_frames is None else min(end, num_context_frames) for end in ends]
    noise = [1 / math.sqrt(end) for end in ends]
    weight = sum(a * length for a, length in zip(noise, lengths, strict=True))
    beta = (base_sparsity - sparsity) * sum(lengths) / weight if ends else 0.0
    limit = math.nextafter(1, 0)
    return (0.0, *(min(max(base_sparsity - a * beta, 0.0), limit) for a in noise))
