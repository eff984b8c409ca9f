"""What a cache policy costs at the size people run: played on meta tensors until nothing changes any more."""

import re
from dataclasses import dataclass, replace
from functools import cache

import torch

from longtake.cache import CachePolicy, Event, Geometry, make_policy
from longtake.cache.simulation import SimulatedBlock, simulate
from longtake.configs.loader import load_preset, preset_names

FRAMES_PER_SECOND = 4  # latent ones, at 16 pixel frames a second
SETTLED_BLOCKS = 12  # as many as change nothing, and a policy is taken to be in its steady state
MOST_BLOCKS = 720  # then it is taken to grow for ever: 9 minutes in blocks of 3
MINUTE = 60
REFERENCE = re.compile(r"arXiv:[0-9.]+[0-9]")


@dataclass(frozen=True)
class _PolicyFacts:
    """What the table of policies says of one.

    Attributes:
        context_frames: Most that a block or window attends to, itself included, in frames' worth of tokens.
        context_tokens: The same in tokens.
        attended_bytes: Keys and values that it attends to beside itself.
        stored_bytes: Keys and values that are kept between blocks.
        grows: Bytes per minute of video that are still added to what is stored; 0: bounded.
        after_seconds: Length of video at which these are the figures, or from which on they hold.
    """

    context_frames: float
    context_tokens: int
    attended_bytes: int
    stored_bytes: int
    grows: float
    after_seconds: float

    @property
    def is_bounded(self) -> bool:
        """Whether memory stays the same however long the video."""
        return not self.grows


def wan_1_3b(frames_per_block: int = 3) -> Geometry:
    """Wan2.1-T2V-1.3B at 832x480 in bfloat16: 30 layers, 12 heads of 128, 1,560 tokens a frame; sizes alone."""
    return Geometry(
        num_layers=30,
        num_heads=12,
        head_dim=128,
        num_rows=30,
        num_columns=52,
        frames_per_block=frames_per_block,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )


def preset_policy(name: str) -> CachePolicy:
    """A policy as its preset has it.

    Raises:
        ValueError: If the preset cannot stand alone: a policy that needs a file of the user's, say.
    """
    return make_policy(load_preset("cache", name) if name in preset_names("cache") else name)


def summary(cls: type[CachePolicy]) -> str:
    """First paragraph of a policy's docstring, and its source unless the paragraph names it already."""
    first = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
    references = REFERENCE.findall(cls.source) or [cls.source]
    return first if all(reference in first for reference in references) else f"{first} Source: {cls.source}."


def needs(policy: CachePolicy) -> str:
    """What it needs beside the model: weights or a VAE."""
    wanted = {"VAE": policy.needs_vae, "weights": policy.needs_weights}
    return ", ".join(name for name, is_needed in wanted.items() if is_needed) or "-"


def events(policy: CachePolicy) -> list[Event]:
    """Prompt events that it knows, the trivial one left out."""
    return sorted(policy.events - {"keep"})


@cache
def facts(policy: CachePolicy, geometry: Geometry | None = None) -> _PolicyFacts:
    """Play a policy until nothing changes any more, or for a minute if that never comes.

    One layer is played for all: policies that treat layers differently keep as much in each of them, or refuse a
    model of one layer, and then all are played.

    Args:
        policy: What to measure.
        geometry: Shapes; ``wan_1_3b`` with the source's block size unless given.

    Raises:
        ValueError: If the policy has no room for the geometry's blocks, or what it needs is made for another model.
    """
    try:
        return _measured(policy, geometry)
    except RuntimeError as error:
        raise ValueError(f"what {policy.name} needs is made for a model of other shapes ({error}).") from error


def _measured(policy: CachePolicy, geometry: Geometry | None) -> _PolicyFacts:
    g = geometry or wan_1_3b(policy.published_block)
    played = replace(g, num_layers=1)
    try:
        policy.start(played)
    except ValueError:
        played = g
    attended, stored, steady = 0.0, 0, 0
    is_bounded = True
    for block in simulate(policy, played, MOST_BLOCKS, window_blocks=policy.published_window):
        now_attended, now_stored = block.denoise.num_tokens, block.stats.num_bytes
        if now_attended > attended or now_stored > stored:
            attended, stored, steady = max(attended, now_attended), max(stored, now_stored), block.index
        is_bounded = block.denoise.is_bounded or not block.denoise.spans
        seconds = _seconds(block)
        is_settled = block.index >= steady + SETTLED_BLOCKS
        if is_settled or (not is_bounded and seconds >= MINUTE):
            break
    stored = stored * g.num_layers // played.num_layers
    grows = 0.0 if is_settled else stored / seconds * MINUTE
    token_bytes = 2 * g.num_layers * g.num_heads * g.head_dim * g.dtype.itemsize * g.batch_size
    context = round(attended) + policy.published_window * g.frames_per_block * g.tokens_per_frame
    return _PolicyFacts(
        context_frames=context / g.tokens_per_frame,
        context_tokens=context,
        attended_bytes=round(attended * token_bytes),
        stored_bytes=stored,
        grows=grows,
        after_seconds=(steady + 1) * g.frames_per_block / FRAMES_PER_SECOND if is_settled else seconds,
    )


def _seconds(block: SimulatedBlock) -> float:
    return (block.start_frame + block.num_frames) / FRAMES_PER_SECOND
