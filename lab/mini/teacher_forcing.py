"""Teacher forcing for block-causal training: every block of a clip in one pass of the unmodified transformer.

The input carries each clip twice along the frame axis, ``[clean blocks | noisy blocks]``, with a timestep per block
and half. Inside :func:`teacher_forcing` the self-attention sees to it that clean block i reads the clean blocks its
context names and itself, and noisy block i the same clean blocks and itself, both halves rotated at their true
frames. That is what a cached rollout computes block after block: denoising passes are the noisy half, commit passes
the clean half.

Source: block-causal teacher forcing as in CausVid, arXiv:2412.07772, and Self Forcing, arXiv:2506.08009.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from longtake.models.wan import AttentionProcessor, blocks_of, processors_set, project_out

ROPE_THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class ContextLayout:
    """Clean blocks that each block reads beside itself.

    Attributes:
        num_sink_blocks: First blocks that stay visible for ever.
        num_window_blocks: Most recent earlier blocks that are visible; None means all of them.
        is_contiguous: True if sinks are moved up in time to end where the window begins, as a rollout with
            contiguous positions does; else every block stays at its own frame.
    """

    num_sink_blocks: int = 0
    num_window_blocks: int | None = None
    is_contiguous: bool = False

    def __post_init__(self) -> None:
        """Refuse counts that name no context."""
        if self.num_sink_blocks < 0 or (self.num_window_blocks is not None and self.num_window_blocks < 0):
            raise ValueError(
                f"num_sink_blocks={self.num_sink_blocks} and num_window_blocks={self.num_window_blocks} must not be "
                "negative: use 0 for none, or num_window_blocks=None for all earlier blocks."
            )

    def visible(self, block_index: int) -> list[int]:
        """Return the earlier blocks that ``block_index`` reads, oldest first."""
        if self.num_window_blocks is None:
            return list(range(block_index))
        start = max(0, block_index - self.num_window_blocks)
        return [*range(min(self.num_sink_blocks, start)), *range(start, block_index)]

    def shift(self, block_index: int) -> int:
        """Return by how many blocks the sinks that ``block_index`` reads are moved up in time."""
        if not self.is_contiguous or self.num_window_blocks is None:
            return 0
        start = max(0, block_index - self.num_window_blocks)
        return start - min(self.num_sink_blocks, start)


@dataclass(kw_only=True)
class TeacherForcingPlan:
    """Geometry of one training batch, read by every attention layer.

    Attributes:
        num_blocks: Blocks of a clip; the transformer's input has twice as many.
        frames_per_block: Latent frames of a block.
        rows: Token rows of a frame, after patching.
        columns: Token columns of a frame, after patching.
        layout: The context of each block; may be replaced between batches.
    """

    num_blocks: int
    frames_per_block: int
    rows: int
    columns: int
    layout: ContextLayout = field(default_factory=ContextLayout)

    @property
    def tokens_per_block(self) -> int:
        """Tokens of one block."""
        return self.frames_per_block * self.rows * self.columns


def rotary_tables(frames: Tensor, *, rows: int, columns: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of a run of frames, as diffusers' WanRotaryPosEmbed lays them out.

    Args:
        frames: (F,) frame positions, any real number.
        rows: Token rows of a frame.
        columns: Token columns of a frame.
        head_dim: Even width of a head; split into t/h/w = d - 4 (d // 6), 2 (d // 6), 2 (d // 6).

    Returns:
        Two (F * rows * columns, head_dim / 2) float32 tensors, one column per rotated pair.

    Source: RoFormer, arXiv:2104.09864, with Wan2.1's three axes.
    """
    spatial = 2 * (head_dim // 6)
    widths = (head_dim - 2 * spatial, spatial, spatial)
    axes = (
        frames.double()[:, None, None].expand(-1, rows, columns),
        torch.arange(rows, dtype=torch.float64)[None, :, None].expand(len(frames), -1, columns),
        torch.arange(columns, dtype=torch.float64)[None, None, :].expand(len(frames), rows, -1),
    )
    angles = []
    for width, position in zip(widths, axes, strict=True):
        frequencies = ROPE_THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(position.reshape(-1, 1) * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate_pairs(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of (B, L, H, D) by (L, D / 2) tables; the dtype stays."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosines, sines = cosines[:, None], sines[:, None]
    return torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1).flatten(-2).type_as(x)


class _TeacherForcingProcessor(AttentionProcessor[TeacherForcingPlan]):
    """Self-attention over ``[clean | noisy]`` tokens, block by block, without a mask over the whole length.

    (B, 2 * blocks * tokens, dim) to the same shape; the rotation is the plan's own.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        plan = self.owner
        query = _split(_normalise(attn.norm_q, attn.to_q(hidden_states)), plan, attn.heads)
        key = _split(_normalise(attn.norm_k, attn.to_k(hidden_states)), plan, attn.heads)
        value = _split(attn.to_v(hidden_states), plan, attn.heads)
        blocks = range(plan.num_blocks)
        query, own = _rotate_blocks(query, plan, blocks), _rotate_blocks(key, plan, blocks)
        outputs = [_attend_block(query, key, own, value, plan, index) for index in blocks]
        mixed = torch.stack(outputs, dim=2)  # (B, 2, blocks, heads, tokens, head_dim)
        return project_out(attn, mixed.transpose(3, 4).flatten(1, 3).type_as(hidden_states))


class _CrossAttentionProcessor(AttentionProcessor[TeacherForcingPlan]):
    """Attention to the text by two plain products: for so few keys they train faster than the fused kernel."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        heads = (attn.heads, -1)
        query = _normalise(attn.norm_q, attn.to_q(hidden_states)).unflatten(2, heads).transpose(1, 2)
        key = _normalise(attn.norm_k, attn.to_k(encoder_hidden_states)).unflatten(2, heads).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, heads).transpose(1, 2)
        weights = torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), dim=-1)
        return project_out(attn, (weights.type_as(value) @ value).transpose(1, 2).type_as(hidden_states))


def _normalise(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm with its weight in the input's type: mixed types miss the fused kernel."""
    return functional.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def _forward_block(
    block: WanTransformerBlock, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: object
) -> Tensor:
    """The transformer block's own forward with one modulation per (half, block) instead of one per token.

    ``hidden_states`` is (B, L, dim) and ``temb`` (B, groups, 6, dim); groups divide L into equal runs of tokens.
    """
    groups = temb.shape[1]
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + temb.float()).split(1, dim=2)

    def modulate(norm: nn.Module, scale: Tensor, shift: Tensor) -> Tensor:
        x = norm(hidden_states.float()).unflatten(1, (groups, -1))
        return torch.addcmul(shift, x, 1 + scale).flatten(1, 2).type_as(hidden_states)

    def add(change: Tensor, gate: Tensor) -> Tensor:
        runs = change.float().unflatten(1, (groups, -1))
        summed = torch.addcmul(hidden_states.float().unflatten(1, (groups, -1)), runs, gate)
        return summed.flatten(1, 2).type_as(hidden_states)

    hidden_states = add(block.attn1(modulate(block.norm1, scale, shift), None, None, rotary_emb), gate)
    text = block.attn2(block.norm2(hidden_states.float()).type_as(hidden_states), encoder_hidden_states, None, None)
    hidden_states = hidden_states + text
    return add(block.ffn(modulate(block.norm3, ffn_scale, ffn_shift)), ffn_gate)


def _split(x: Tensor, plan: TeacherForcingPlan, heads: int) -> Tensor:
    """(B, L, H * D) to (B, 2, blocks, H, tokens, D)."""
    x = x.unflatten(2, (heads, -1)).unflatten(1, (2, plan.num_blocks, plan.tokens_per_block))
    return x.transpose(3, 4)


def _block_tables(plan: TeacherForcingPlan, blocks: range | list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Tables (blocks, 1, tokens, D / 2) for blocks standing at the given block indices."""
    starts = torch.tensor(list(blocks))[:, None] * plan.frames_per_block
    frames = (starts + torch.arange(plan.frames_per_block)[None]).flatten()
    tables = rotary_tables(frames, rows=plan.rows, columns=plan.columns, head_dim=like.shape[-1])
    cosines, sines = (table.to(like).unflatten(0, (len(starts), 1, -1)) for table in tables)
    return cosines, sines


def _rotate_blocks(x: Tensor, plan: TeacherForcingPlan, blocks: range | list[int]) -> Tensor:
    """Rotate (..., blocks, H, tokens, D) as if the blocks stood at the given block indices."""
    cosines, sines = _block_tables(plan, blocks, x)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1).flatten(-2).type_as(x)


def _attend_block(
    query: Tensor, key: Tensor, own: Tensor, value: Tensor, plan: TeacherForcingPlan, index: int
) -> Tensor:
    """Attention of clean and noisy block ``index``; (B, 2, H, tokens, D).

    Both read the same context, so one product serves them: the keys are [context, clean self, noisy self] and a small
    bias keeps each half from the other's self.
    """
    layout, tokens = plan.layout, plan.tokens_per_block
    visible = layout.visible(index)
    shift = layout.shift(index)
    first = visible[0] if visible else 0
    is_run = visible == list(range(first, first + len(visible)))
    context = own[:, 0, first : first + len(visible)] if is_run else own[:, 0, visible]
    if shift and visible:
        num_moved = sum(block < layout.num_sink_blocks for block in visible)
        moved = _rotate_blocks(key[:, 0, visible[:num_moved]], plan, [b + shift for b in visible[:num_moved]])
        context = torch.cat([moved, context[:, num_moved:]], dim=1)
    keys = torch.cat([context, own[:, :, index]], dim=1).transpose(1, 2).flatten(2, 3)
    context = value[:, 0, first : first + len(visible)] if is_run else value[:, 0, visible]
    values = torch.cat([context, value[:, :, index]], dim=1).transpose(1, 2).flatten(2, 3)
    queries = query[:, :, index].transpose(1, 2).flatten(2, 3)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    bias = scores.new_zeros(2 * tokens, keys.shape[2])
    bias[:tokens, -tokens:] = -torch.inf
    bias[tokens:, -2 * tokens : -tokens] = -torch.inf
    weights = torch.softmax(scores + bias, dim=-1)
    return (weights.type_as(values) @ values).unflatten(2, (2, tokens)).transpose(1, 2)


@contextmanager
def teacher_forcing(transformer: WanTransformer3DModel, plan: TeacherForcingPlan) -> Iterator[WanTransformer3DModel]:
    """Install the training attention and remove it on leaving.

    Inside, timesteps are embedded, and modulations added up, once per block instead of once per token: the result is
    the same at half the memory traffic.

    Args:
        transformer: diffusers' transformer, patch size (1, p, p).
        plan: Geometry; its ``layout`` may be changed between forward passes.

    Yields:
        The transformer, to be called through :func:`predict_flow`.
    """
    embedder: Any = transformer.condition_embedder
    blocks = blocks_of(transformer)
    embed_tokens = embedder.forward

    def embed_groups(timestep, text, image=None, timestep_seq_len=None):
        per_group = timestep.unflatten(0, (-1, timestep_seq_len))[:, :: plan.tokens_per_block]
        temb, projection, text, image = embed_tokens(per_group.flatten(), text, image, per_group.shape[1])
        return temb.repeat_interleave(plan.tokens_per_block, dim=1), projection, text, image

    processors = []
    for layer, block in enumerate(blocks):
        processors += [(block.attn1, _TeacherForcingProcessor(plan, layer))]
        processors += [(block.attn2, _CrossAttentionProcessor(plan, layer))]
    try:
        for block in blocks:
            block.forward = partial(_forward_block, block)
        embedder.forward = embed_groups
        with processors_set(processors):
            yield transformer
    finally:
        for module in (*blocks, embedder):
            del module.forward


def predict_flow(
    transformer: WanTransformer3DModel,
    plan: TeacherForcingPlan,
    *,
    clean: Tensor,
    noisy: Tensor,
    clean_timesteps: Tensor,
    noisy_timesteps: Tensor,
    prompt_embeds: Tensor,
) -> Tensor:
    """Predict the flow of every noisy block in one pass; call it inside :func:`teacher_forcing`.

    Args:
        transformer: The transformer that :func:`teacher_forcing` yielded.
        plan: The plan it was given.
        clean: (B, C, F, H, W) context latents, F = num_blocks * frames_per_block.
        noisy: (B, C, F, H, W) latents to denoise.
        clean_timesteps: (B, num_blocks), 0 to 1000: the context noise's timestep.
        noisy_timesteps: (B, num_blocks), 0 to 1000.
        prompt_embeds: (B, text tokens, text_dim).

    Returns:
        (B, C, F, H, W), the prediction of noise - x0.

    Raises:
        ValueError: If the number of frames is not the plan's.
    """
    num_frames = plan.num_blocks * plan.frames_per_block
    if clean.shape[2] != num_frames or noisy.shape != clean.shape:
        raise ValueError(
            f"clean has {clean.shape[2]} frames and noisy {noisy.shape[2]}, the plan {num_frames}: "
            "pass latents of num_blocks * frames_per_block frames each."
        )
    timesteps = torch.cat([clean_timesteps, noisy_timesteps], dim=1).repeat_interleave(plan.tokens_per_block, dim=1)
    latents = torch.cat([clean, noisy], dim=2)
    return transformer(latents, timesteps, prompt_embeds, return_dict=False)[0][:, :, num_frames:]
