"""One row per policy of the shared matrix (test_policies.py crosses them with block sizes and storage wrappers).

To add a policy, put its rows at the end of ``POLICY_ROWS``: ``"name"`` or ``"name.variant"``. Choose small settings,
so that a few blocks fill the cache, with room for blocks of 4. Say what holds; every field that is not given takes the
strictest meaning:

- everything bounded says ``limit``; a policy that keeps archives needs settings that cap them;
- a policy that averages, merges, replays or compresses names in ``exact_roles`` the roles of reads whose tokens are
  still the stored ones, each at most once (``()`` for none);
- one that lets go of something before ``limit`` frames are there gives ``full_until``;
- one whose positions stay in a range gives ``positions``.

The tests play ``EncodeJob``s with random or marked keys and values, and every event of ``policy.events``.
Keys, values and queries are (batch, frames * tokens, 2 heads, 16 channels); ``grid`` is for policies that pool cells.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longtake.cache import CachePolicy


@dataclass(frozen=True)
class Row:
    """Promises of a policy."""

    settings: Mapping[str, Any] | CachePolicy  # as ``make_policy`` takes them
    limit: float | None  # frames' worth of tokens attended at most, the block included; None: unbounded
    sinks: int = 0  # first frames of which every token is read, for ever
    # Last frames before the block of which every token is read; None: all of ``limit`` that neither the sinks nor the
    # block take, or 0 where ``exact_roles`` is given
    recent: int | None = None
    # Roles of reads whose tokens are as they were stored, at most once each; None: all roles
    exact_roles: tuple[str, ...] | None = None
    full_until: float | None = None  # equal to full attention in blocks that end at or before it; None: ``limit``
    positions: tuple[float, float] | None = None  # lowest and highest ever; None: 0 to the newest frame's index
    grid: tuple[int, int] = (1, 2)  # token rows and columns of a frame
    settles: int = 100  # blocks after which the number of tokens and bytes repeats itself
    layers: int = 1  # fewest layers that show all that the policy does
    is_per_sample: bool = True  # what a video reads does not depend on the others in its batch
    is_same_in_commits: bool = True  # commit passes read what denoising does; False: they may read less

    @property
    def until(self) -> float:
        """Last frame at which nothing has had to go."""
        limit = math.inf if self.limit is None else self.limit
        return limit if self.full_until is None else self.full_until


def policy(name: str, **values: Any) -> dict[str, Any]:
    """Settings of a policy."""
    return {"policy": name} | values


def framed(
    name: str, limit: int, settings: Mapping[str, Any] | None = None, *, sinks: int = 0, **promises: Any
) -> Row:
    """A row of a policy that has ``num_context_frames`` of its limit and, where there are any, ``num_sink_frames``."""
    sizes = {"num_context_frames": limit} | ({"num_sink_frames": sinks} if sinks else {})
    return Row(policy(name, **sizes, **(settings or {})), limit, sinks=sinks, **promises)


SMALL_PACK = {"num_sink_frames": 4, "num_recent_frames": 4, "num_selected_blocks": 2, "num_archive_blocks": 5}
PACKED = {"exact_roles": ("sink", "recent"), "grid": (4, 4)}
DEEP_PAPER = {"positions": "contiguous", "unify_top": True, "fusion": "max", "max_reuse": 0}
INFINITY = {"positions": "contiguous", "global_sink": False, "recache": "causal"}
IN_FULL = {"compressor": "none", "selection": "softmax_mass", "positions": "absolute", "archive": "host"}
FEW_CANDIDATES = {"num_recent_frames": 4, "num_budget_frames": 15, "num_candidates": 2, "positions": "absolute"}
TWO_HEADS = {"num_sink_frames": 2, "num_recent_frames": 2, "num_plain_layers": 0, "positions": "contiguous"}

POLICY_ROWS = {
    "full": Row(policy("full"), None),
    "sliding_window": framed("sliding_window", 12),
    "sliding_window.contiguous": framed("sliding_window", 10, {"positions": "contiguous"}, positions=(0, 9)),
    "attention_sink": framed("attention_sink", 12, sinks=3, positions=(0, 11)),
    "attention_sink.absolute": framed("attention_sink", 11, {"positions": "absolute"}, sinks=4),
    "deep_forcing": framed("deep_forcing", 12, {"num_budget_frames": 10, "num_recent_frames": 4}, sinks=4, recent=0),
    "deep_forcing.paper": framed(
        "deep_forcing", 12, {"num_budget_frames": 10, "num_recent_frames": 5} | DEEP_PAPER, sinks=3, recent=1
    ),
    "deep_forcing.none": framed("deep_forcing", 12, {"compression": "none"}, sinks=5),
    "pack": Row(policy("pack", **SMALL_PACK), 16, sinks=4, recent=4, full_until=9, **PACKED),
    "pack.lr": Row(
        policy("pack", **SMALL_PACK | {"num_recent_frames": 2, "compressor": "lr", "mid_span": 2.0}),
        14,
        sinks=4,
        recent=2,
        full_until=7,
        **PACKED,
    ),
    "pack.softmax_mass": Row(policy("pack", **SMALL_PACK, **IN_FULL), 22, sinks=4, recent=4, full_until=11),
    "longlive": framed("longlive", 12, sinks=3),
    "longlive.infinity": framed("longlive", 11, INFINITY, sinks=2, positions=(0, 10)),
    "infinity_rope": framed("infinity_rope", 7, sinks=1, positions=(0, 48)),
    "infinity_rope.paper": framed(
        "infinity_rope", 9, {"num_flush_frames": 1, "placement": "paper"}, sinks=2, positions=(0, 48)
    ),
    "anchor": framed("anchor", 14, sinks=3, recent=4, full_until=11, positions=(0, 20)),
    "tempcache": framed("tempcache", 12, exact_roles=()),
    "tempcache.absolute": framed("tempcache", 10, {"positions": "absolute"}, exact_roles=()),
    "ema_sink": framed(
        "ema_sink", 12, {"num_sink_frames": 3, "alpha": 0.9}, recent=5, exact_roles=("recent",), positions=(0, 11)
    ),
    "memrope": framed("memrope", 12, sinks=3, recent=3, exact_roles=("sink", "recent"), positions=(0, 11)),
    "rolling_sink": framed("rolling_sink", 13, recent=1, exact_roles=("recent",)),
    "relax": framed("relax", 9, {"num_budget_frames": 24}, sinks=2, recent=1, positions=(0, 8)),
    "relax.absolute": framed("relax", 12, FEW_CANDIDATES, sinks=1, recent=4),
    "slow_fast": framed("slow_fast", 15, {"num_recent_frames": 8}, sinks=2, recent=4, positions=(0, 14)),
    "commit_reads": Row(
        policy("commit_reads", num_recent_frames=2, inner=framed("attention_sink", 12, sinks=3).settings),
        12,
        sinks=3,
        positions=(0, 11),
        is_same_in_commits=False,
    ),
    "forcing_kv": Row(policy("forcing_kv", heads=[[], [1]]), 7, sinks=1, recent=1, full_until=3, layers=2),
    "forcing_kv.contiguous": Row(
        policy("forcing_kv", heads=[[0], []], **TWO_HEADS), 9, sinks=2, recent=2, full_until=4, layers=2
    ),
    "rolling_forcing": framed("rolling_forcing", 12, sinks=3, is_same_in_commits=False),
    "rolling_forcing.keep_sinks": framed("rolling_forcing", 11, {"commit": "keep_sinks"}, sinks=2),
    "dilated_window": framed(
        "dilated_window", 12, {"num_dilated_frames": 3, "dilation": 4}, recent=5, positions=(0, 11)
    ),
    "dilated_window.absolute": framed(
        "dilated_window", 12, {"num_dilated_frames": 4, "positions": "absolute"}, recent=4
    ),
}
