"""The slow, obvious version: all frames in one pass of the stock transformer, with a mask.

No cache, no hooks: diffusers' own forward with per-token timesteps and an attention mask, in any dtype.
"""

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor


def frame_mask(num_frames, reads):
    """(frames, frames) bool from a function frame -> frames it may attend to."""
    mask = torch.zeros(num_frames, num_frames, dtype=torch.bool)
    for frame in range(num_frames):
        mask[frame, list(reads(frame))] = True
    return mask


class Masked(WanAttnProcessor):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


@torch.no_grad()
def masked_flow(transformer, x, *, timesteps, prompt_embeds, mask):
    """Flow of (batch, frames, channels, height, width) latents with one timestep per frame and a frame mask."""
    _, patch_height, patch_width = transformer.config.patch_size
    size = x.shape[3] // patch_height * (x.shape[4] // patch_width)
    tokens = mask.repeat_interleave(size, 0).repeat_interleave(size, 1)
    stock = [block.attn1.processor for block in transformer.blocks]
    for block in transformer.blocks:
        block.attn1.set_processor(Masked(tokens))
    timestep = torch.as_tensor(timesteps, dtype=torch.float32).repeat_interleave(size)[None].expand(x.shape[0], -1)
    out = transformer(x.transpose(1, 2), timestep, prompt_embeds, return_dict=False)[0].transpose(1, 2)
    for block, processor in zip(transformer.blocks, stock, strict=True):
        block.attn1.set_processor(processor)
    return out
