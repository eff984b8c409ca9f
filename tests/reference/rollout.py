"""The slow, obvious rollout: no cache, everything so far through the stock transformer again at every step."""

import block_causal
import torch


def rollout(transformer, embeds, *, noise, blocks, sigmas, reads, context_timestep=0.0, given=None):
    """Few-step rollout of (batch, frames, channels, height, width) latents.

    ``blocks`` are the frames of every block, those of ``given`` latents included; ``reads`` gives, for a block's start
    and length, the frames before it that it attends to. Given frames are at timestep 0, generated ones at
    ``context_timestep``.
    """
    clean = given if given is not None else torch.zeros(embeds.shape[0], 0, *noise.shape[1:])
    num_given, starts = clean.shape[1], [sum(blocks[:i]) for i in range(len(blocks))]
    index = 0
    for start, length in zip(starts, blocks, strict=True):
        if start < num_given:
            continue
        allowed = {}
        for s, n in zip(starts, blocks, strict=True):
            for frame in range(s, s + n):
                allowed[frame] = [*reads(s, n), *range(s, s + n)]
        mask = block_causal.frame_mask(start + length, allowed.__getitem__)
        x = noise.initial(index, start, (clean.shape[0], length, *noise.shape[1:]))
        for step, sigma in enumerate(sigmas):
            levels = [0.0] * min(num_given, start) + [context_timestep] * (start - min(num_given, start))
            flow = block_causal.masked_flow(
                transformer,
                torch.cat((clean, x), 1),
                timesteps=levels + [1000 * sigma] * length,
                prompt_embeds=embeds,
                mask=mask,
            )[:, start:]
            x0 = x - sigma * flow
            if step + 1 < len(sigmas):
                fresh = noise.renoise(index, start, step, x.shape)
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * fresh
        clean = torch.cat((clean, x0), 1)
        index += 1
    return clean[:, num_given:]
