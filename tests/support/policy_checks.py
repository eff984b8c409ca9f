"""Promises of every policy (ARCHITECTURE, section 3): functions of a row, a block size and a wrapper."""

import json
import math
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import torch
from policy_driver import HEADS, PLAIN, Player, make_geometry, marked, read_marks, spans
from policy_rows import POLICY_ROWS

from longtake.cache import make_policy
from longtake.cache.base import HeadGroup
from longtake.cache.footprint import footprint
from longtake.cache.wrappers.budget import Budget


def plain(settings):
    return settings


def quantized(settings):
    return {"policy": "quantized", "bits": 8, "inner": settings}


def offloaded(settings):
    return {"policy": "offloaded", "inner": settings}


@dataclass(frozen=True, kw_only=True)
class OneByteLess(Budget):
    """A budget that the inner policy misses by a byte as it is, so that it has to be encoded."""

    def choose(self, geometry):
        return _encoded_to_fit(self.inner, replace(geometry, max_frames=60))


@cache
def _encoded_to_fit(policy, geometry):
    return Budget(inner=policy, max_bytes=footprint(policy, geometry).budgeted - 1).choose(geometry)


def budget(settings):
    return OneByteLess(inner=make_policy(settings))


WRAPPERS = {wrap.__name__: wrap for wrap in (plain, quantized, offloaded, budget)}
TOLERANCES = {quantized: 0.05, budget: 0.05}  # of attention's outputs, which have a standard deviation of 0.3 to 1


def within(row, end):
    """Lowest and highest position that a row allows a block that ends at frame ``end``."""
    return row.positions if row.positions is not None else (0, end - 1)


def number_range(positions):
    if isinstance(positions, torch.Tensor):
        assert positions.isfinite().all(), "a position is not finite"
        return (positions[..., 0].min().item(), positions[..., 0].max().item()) if positions.numel() else None
    assert all(map(math.isfinite, positions)), "a position is not finite"
    return (min(positions), max(positions)) if positions else None


def groups_of(context):
    if not context.groups:
        return (HeadGroup(tuple(range(HEADS)), context.reads, context.capacity),)
    heads = sorted(head for group in context.groups for head in group.heads)
    assert heads == list(range(HEADS)), "every head is in exactly one group"
    return context.groups


class Watcher:
    def __init__(self, row, geometry, is_looked_at):
        self.row, self.geometry, self.is_looked_at = row, geometry, is_looked_at
        self.attended = Counter()

    def __call__(self, layer, pass_, context):
        if pass_.kind == "encode":
            return
        row, end = self.row, pass_.start_frame + pass_.num_frames
        size = self.geometry.tokens_per_frame
        lowest, highest = within(row, end)
        spans_seen = [number_range(context.query_positions)]
        for group in groups_of(context):
            num_tokens = sum(read.stored.num_tokens for read in group.reads)
            self.attended[pass_.block_index] = max(self.attended[pass_.block_index], num_tokens)
            if row.limit is not None:
                assert num_tokens <= (row.limit - pass_.num_frames) * size, "more attended than the limit"
                assert num_tokens <= group.capacity, "a bounded policy says how large its context gets"
            for read in group.reads:
                self.check_read(read, end)
                spans_seen.append(number_range(read.positions))
            if self.is_looked_at(pass_.block_index):
                self.check_tokens(group, pass_)
        for span in filter(None, spans_seen):
            assert lowest - 1e-6 <= span[0] and span[1] <= highest + 1e-6, f"position outside the range: {span}"

    def check_read(self, read, end):
        count, size = read.stored.num_tokens, self.geometry.tokens_per_frame
        by_token = isinstance(read.positions, torch.Tensor)
        assert count == (read.positions.shape[-2] if by_token else len(read.positions) * size), "a position for each"
        assert read.role and (read.frames or not count), "role and frames are what tools draw"
        assert all(0 <= frame < end for frame in read.frames)

    def check_tokens(self, group, pass_):
        """No stored token is lost, doubled or mixed up with another's."""
        row, start, size = self.row, pass_.start_frame, self.geometry.tokens_per_frame
        exact = [read for read in group.reads if row.exact_roles is None or read.role in row.exact_roles]
        keys = [read_marks(read.stored.keys) for read in exact]
        values = [read_marks(read.stored.values) for read in exact]
        for k, v in zip(keys, values, strict=True):
            k[..., 4] += 1
            assert torch.equal(k, v), "keys and values belong to each other"
            assert (k[..., 2] == torch.arange(k.shape[0])[:, None, None]).all(), "a token of another video"
            assert (k[..., 3] == torch.tensor(group.heads)).all(), "a token of another head"
        for sample in range(self.geometry.batch_size):
            for head in range(len(group.heads)):
                rows = [tuple(t) for k in keys for t in k[sample, :, head].tolist() if t[5] == PLAIN]
                seen = {(t[0], t[1]) for t in rows}
                assert len(rows) == len(seen), "a token is read twice"
                assert all(frame < start for frame, _ in seen), "a token of the future"
                if pass_.kind == "denoise" or row.is_same_in_commits:
                    self.check_complete(seen, start, pass_.num_frames, size)

    def check_complete(self, seen, start, num_frames, size):
        """One head of one sample reads all that it has to, from (frame, token) pairs."""
        row = self.row
        until = row.until
        complete = Counter(frame for frame, _ in seen)
        if start + num_frames <= until:
            wanted = [*range(start)] if row.exact_roles is None else []
        else:
            recent = row.recent
            if recent is None:
                recent = 0 if row.exact_roles is not None else int(row.limit) - num_frames - row.sinks
            sinks = row.sinks if row.exact_roles is None or "sink" in row.exact_roles else 0
            wanted = [*range(min(sinks, start)), *range(max(start - recent, 0), start)]
        lost = [frame for frame in wanted if complete[frame] != size]
        assert not lost, f"frames {lost} are not all there for the block at {start}"


def check_a_thousand_blocks(row, block, wrap=plain, *, num_blocks=None, first=None, layers=None):
    """Budget, sinks, window, positions, and nothing that grows."""
    if num_blocks is None:
        num_blocks = 40 if row.limit is None else 1000
    # Whether a wrapper keeps layers apart shows in the shorter checks, too.
    geometry = make_geometry(block, grid=row.grid, layers=layers or (2 if wrap is plain else row.layers))
    far = {frame // block for frame in (1023, 1024, 10_000)}
    looked_at = {*range(min(30, 120 // block)), *range(0, num_blocks, 97), num_blocks - 1, *far}
    watcher = Watcher(row, geometry, looked_at.__contains__)
    player = Player(wrap(row.settings), geometry, content=marked, watch=watcher, attends=False)
    stored = []
    for span in spans(num_blocks, block, first=first):
        player.block(span, steps=1)
        if span.index < 30 or span.index % 7 == 0:
            stats = player.cache.stats()
            assert stats.tokens.keys() == stats.bytes.keys()
            stored.append((span.index, stats.num_tokens, stats.num_bytes))
    low, high = stats.positions
    assert math.isfinite(low) and math.isfinite(high)
    if row.limit is not None and num_blocks >= 4 * row.settles:
        half = (row.settles + num_blocks) // 2
        counts = [(index, (watcher.attended[index], *sizes)) for index, *sizes in stored]
        for number, name in enumerate(("attended tokens", "stored tokens", "stored bytes")):
            early = max(sizes[number] for index, sizes in counts if row.settles <= index < half)
            assert early == max(sizes[number] for index, sizes in counts if index >= half), f"{name} keep changing"


def check_far_frames(row, block, wrap=plain):
    """Frames 1,023, 1,024 and 10,000 are like any other."""
    if row.limit is None:
        block = 128
    check_a_thousand_blocks(row, block, wrap, num_blocks=10_000 // block + 2, layers=row.layers)


def check_frame_first(row, block, wrap=plain):
    check_a_thousand_blocks(row, block, wrap, num_blocks=24, first=1)
    same(*(roll(row, block, wrap, num_blocks=8, first=1) for _ in range(2)))


def roll(row, block, wrap=plain, *, num_blocks=12, first=None, samples=(0, 1), steps=2, events=None, settings=None):
    geometry = make_geometry(block, grid=row.grid)
    player = Player(wrap(row.settings) if settings is None else settings, geometry, samples=samples)
    return [
        [out.clone() for out in player.block(span, steps=steps, event=(events or {}).get(span.index, "keep"))]
        for span in spans(num_blocks, block, first=first)
    ]


def same(first, second, *, atol=0.0):
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=0, atol=atol), f"block {index} differs by {(x - y).abs().max():.2g}"


def check_state_round_trip(row, block, wrap=plain):
    """Saved between a block's denoising and its commit, as a run is, it continues bit for bit."""
    geometry = make_geometry(block, grid=row.grid, batch=2)
    blocks = spans(18, block)
    for cut in (2, 11):
        one, two = (Player(wrap(row.settings), geometry, samples=(0, 1)) for _ in range(2))
        for span in blocks[:cut]:
            one.block(span)
        one.denoise(blocks[cut])
        state = one.cache.state_dict()
        numbers = {key: value for key, value in state.items() if not torch.is_tensor(value)}
        saved = {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}
        two.cache.load_state_dict(saved | json.loads(json.dumps(numbers)))
        for span in blocks[cut + 1 :]:
            same([one.commit(blocks[span.index - 1])], [two.commit(blocks[span.index - 1])])
            same([one.denoise(span)], [two.denoise(span)])
            assert one.cache.stats() == two.cache.stats()


def check_merged_commit(row, block, wrap=plain):
    """A commit and the next block's first pass in one forward, layer by layer, give what two forwards give."""
    geometry = make_geometry(block, grid=row.grid, batch=2)
    apart, merged = (Player(wrap(row.settings), geometry, samples=(0, 1)) for _ in range(2))
    if not merged.cache.merges_commit:
        return
    blocks = spans(14, block)
    same([apart.denoise(blocks[0])], [merged.denoise(blocks[0])])
    for span, following in zip(blocks, blocks[1:], strict=False):
        apart.commit(span)
        same([apart.denoise(following, steps=1)], [merged.commit_with(span, following)])
    assert apart.cache.stats() == merged.cache.stats()


def check_second_rollout(row, block, wrap=plain):
    """Nothing leaks from one video into the next, made by the same policy object."""
    policy = make_policy(wrap(row.settings))
    same(*(roll(row, block, settings=policy) for _ in range(2)))


def check_denoising_changes_nothing(row, block, wrap=plain):
    """More denoising steps in between, and every later block is the same."""
    few, many = (roll(row, block, wrap, steps=steps) for steps in (1, 3))
    layers = len(few[0]) // 2
    same([outputs[layers:] for outputs in few], [outputs[layers:] for outputs in many])


def check_equal_to_full(row, block, wrap=plain):
    """Attention is full attention until something has to go."""
    num_blocks = int(min(row.until, 24) // block)
    ours, full = (roll(row, block, wrap, num_blocks=num_blocks, settings=policy) for policy in (None, "full"))
    if not row.is_same_in_commits:
        ours, full = ([outputs[: len(outputs) // 2] for outputs in blocks] for blocks in (ours, full))
    same(ours, full, atol=TOLERANCES.get(wrap, 1e-5))


def check_batch_order(row, block, wrap=plain):
    """A video does not depend on its place in the batch, nor on its neighbours."""
    together = roll(row, block, wrap, samples=(0, 1, 2))
    moved = roll(row, block, wrap, samples=(2, 0, 1))
    same(together, [[out[[1, 2, 0]] for out in outputs] for outputs in moved], atol=1e-5)
    if row.is_per_sample:
        alone = roll(row, block, wrap, samples=(1,))
        same([[out[1:2] for out in outputs] for outputs in together], alone, atol=1e-5)


def check_events(row, block, wrap=plain):
    """A change of prompt leaves a cache in order: nothing doubled, nothing of the future, no growth."""
    geometry = make_geometry(block, grid=row.grid)
    for event in sorted(make_policy(row.settings).events - {"keep"}):
        for at in (1, 9):
            watcher = Watcher(row, geometry, lambda index: False)
            player = Player(wrap(row.settings), geometry, content=marked, watch=watcher, attends=False)
            for span in spans(at + 1, block):
                player.block(span, event=event if span.index == at else "keep")
            same(*(roll(row, block, wrap, num_blocks=at + 4, events={at: event}) for _ in range(2)))


def check_meta_device(row, block, wrap=plain):
    geometry = make_geometry(block, grid=row.grid, device=torch.device("meta"))
    meta = Player(wrap(row.settings), geometry, attends=False)
    real = Player(wrap(row.settings), make_geometry(block, grid=row.grid), attends=False)
    for span in spans(12, block):
        meta.block(span)
        real.block(span)
    assert meta.cache.stats() == real.cache.stats()


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_a_thousand_blocks,
        check_frame_first,
        check_state_round_trip,
        check_merged_commit,
        check_second_rollout,
        check_denoising_changes_nothing,
        check_equal_to_full,
        check_batch_order,
        check_events,
        check_meta_device,
    )
}


def verdict(case):
    name, block, wrapper, check = case
    try:
        CHECKS[check](POLICY_ROWS[name], block, WRAPPERS[wrapper])
    except Exception:
        return traceback.format_exc()
    return None
