"""Pack against a slow version of the description, its published numbers, and its parts one by one."""

import math
from itertools import product

import pytest
import torch
from policy_driver import Player, make_geometry, random, spans, wan_geometry
from safetensors.torch import save_file

from longtake.cache import Pass, make_policy
from longtake.cache.policies.pack import LatentCompressor, _Bank, cell_factors, load_compressor, num_cells, pool_tokens
from longtake.cache.simulation import simulate
from longtake.rope import axis_frequencies, cell_coordinates, pack_backward, rotate

SMALL = {"policy": "pack", "num_sink_frames": 4, "num_recent_frames": 4, "num_selected_blocks": 2}


def test_positions_of_the_published_figure():
    """S0, S1, M3, M4, M5, M7, R8, R9 of the official overview: M2 and M6 are gone, older entries move forward."""
    assert pack_backward([1] * 8, 10) == (2, 3, 4, 5, 6, 7, 8, 9)
    sizes = {"num_sink_frames": 2, "num_recent_frames": 2, "num_selected_blocks": 4}
    policy = make_policy({"policy": "pack", "compressor": "none"} | sizes)
    geometry = make_geometry(1, batch=1, layers=1)
    state = policy.start(geometry)
    for frame in range(10):
        k = torch.zeros(1, 2, 2, 16)
        k[..., 0] = -1.0 if frame in (2, 6) else 1.0  # what the queries like least
        q = torch.ones_like(k)
        context = state.select(0, Pass("denoise", frame, frame, 1), q)
        state.commit(0, Pass("commit", frame, frame, 1), q, k, k)
    context = state.select(0, Pass("denoise", 10, 10, 1), q)
    frames = {read.role: read.frames for read in context.reads}
    assert frames == {"sink": (0, 1), "mid": (3, 4, 5, 7), "recent": (8, 9)}
    assert [p for read in context.reads for p in read.positions] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert context.query_positions == (10.0,)


@pytest.mark.parametrize("compressor", ["pool", "lr"])
def test_published_sizes(compressor):
    settings = {"policy": "pack", "compressor": compressor, "num_archive_blocks": 20}
    *_, last = simulate(make_policy(settings), wan_geometry(4, num_layers=2), 30)
    tokens, sizes = last.stats.tokens, last.stats.bytes
    assert (tokens["sink"], tokens["mid"], tokens["recent"]) == (12_480, 16 * 182, 6_240)
    assert tokens["archive"] == (20 + 1 - 16) * 182, "the cap, and the recent block's small version that waits"
    assert last.denoise.num_tokens == 21_632 and last.denoise.num_tokens + 4 * 1560 == 27_872
    attended = 30 // 2 * sum(sizes[role] for role in ("sink", "mid", "recent"))
    assert attended == 21_632 * 184_320 <= 4.0e9
    assert [(job.pass_.grid, job.pass_.num_frames) for job in last.jobs] == [((7, 13), 2)] * (compressor == "lr")
    *_, last = simulate(make_policy("pack"), wan_geometry(num_layers=1), 12)
    assert (last.stats.tokens["sink"], last.stats.tokens["recent"]) == (9 * 1560, 6 * 1560), "rounded up to blocks"


def test_sizes_of_other_blocks():
    for block, cells in ((1, (1, 7, 13)), (3, (1, 7, 13)), (4, (2, 7, 13)), (6, (3, 7, 13))):
        policy = make_policy("pack")
        size = (block, 30, 52)
        assert policy.factors(size) == (2, 4, 4) and num_cells(size, policy.factors(size)) == cells
    assert cell_factors((3, 4, 4), (2, 4, 4)) == (2, 2, 2) and num_cells((3, 4, 4), (2, 4, 4)) == (1, 2, 2)
    assert cell_factors((3, 1, 2), (2, 4, 4)) == (2, 1, 1)


class Reference:
    """Everything is kept, and every context is made from it anew, for one layer of keys of one sample."""

    def __init__(self, **settings):
        vars(self).update(settings)  # sinks, recents, chosen, size, cells, span
        self.blocks = []  # (start, q, k, v), each (tokens, heads, channels)

    def small(self, x):
        """Means over cells, by loops, in float64."""
        grid = x.double().unflatten(0, self.size)
        out = torch.zeros(*self.cells, *x.shape[1:], dtype=torch.float64)
        for cell in product(*map(range, self.cells)):
            sides = zip(cell, self.size, self.cells, strict=True)
            tokens = [slice(math.floor(i * s / n), math.ceil((i + 1) * s / n)) for i, s, n in sides]
            out[cell] = grid[tuple(tokens)].flatten(0, 2).mean(0)
        return out.flatten(0, 2)

    def partition(self):
        sinks = [b for b in self.blocks if b[0] < self.sinks]
        rest = self.blocks[len(sinks) :]
        count = min(math.ceil(self.recents / self.size[0]), len(rest))
        return sinks, rest[: len(rest) - count], rest[len(rest) - count :]

    def score(self, q, recents, k):
        """Eq. 11 as it stands: every query with every key, head by head."""
        queries = torch.cat([*(b[1] for b in recents), q]).double()
        products = torch.einsum("ihd,jhd->hij", queries, self.small(k)) / math.sqrt(q.shape[-1])
        return products.sum(dim=(1, 2)).mean()

    def coordinates(self, start, cells, span):
        points = []
        for cell in product(*map(range, cells)):
            sides = zip(cell, (span, *self.size[1:]), cells, strict=True)
            frame, row, column = ((i + 0.5) * s / n - 0.5 for i, s, n in sides)
            points.append([start + frame, row, column])
        return torch.tensor(points, dtype=torch.float64)

    def attend(self, start, q, k, v):
        sinks, mids, recents = self.partition()
        ranked = sorted(range(len(mids)), key=lambda i: -self.score(q, recents, mids[i][2]))[: self.chosen]
        mids = [mids[i] for i in sorted(ranked)]
        cursor, parts = float(start), [(q, k, v, self.coordinates(start, self.size, self.size[0]))]
        own = parts[0][3]
        for b in reversed(recents):
            cursor -= self.size[0]
            parts.insert(0, (*b[1:], self.coordinates(cursor, self.size, self.size[0])))
        for b in reversed(mids):
            cursor -= self.span
            place = self.coordinates(cursor, self.cells, self.span)
            parts.insert(0, (None, self.small(b[2]), self.small(b[3]), place))
        for b in reversed(sinks):
            cursor -= self.size[0]
            parts.insert(0, (*b[1:], self.coordinates(cursor, self.size, self.size[0])))
        turn = axis_frequencies(q.shape[-1])
        keys = torch.cat([rotate(p[1].float()[None], p[3], frequencies=turn)[0] for p in parts])
        values = torch.cat([p[2].float() for p in parts])
        queries = rotate(q[None], own, frequencies=turn)[0]
        weights = (torch.einsum("ihd,jhd->hij", queries, keys) / math.sqrt(q.shape[-1])).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights, values)


def compare(settings, *, block, span=None):
    """Largest difference between a pack and the slow version, over 14 blocks."""
    geometry = make_geometry(block, grid=(4, 5), batch=2, layers=1)
    player = Player(SMALL | settings, geometry, samples=(0, 1))
    policy = player.cache.policy
    cells = num_cells((block, 4, 5), policy.factors((block, 4, 5)))
    references = [
        Reference(sinks=4, recents=4, chosen=2, size=(block, 4, 5), cells=cells, span=span or block) for _ in range(2)
    ]
    worst = 0.0
    for block_span in spans(14, block):
        ours = player.denoise(block_span, steps=1)[0]
        denoise = Pass("denoise", block_span.index, block_span.start, block)
        commit = Pass("commit", block_span.index, block_span.start, block)
        q, k, v = random(0, denoise, geometry, (0, 1))
        for sample, reference in enumerate(references):
            theirs = reference.attend(block_span.start, q[sample], k[sample], v[sample])
            worst = max(worst, (ours[sample] - theirs).abs().max().item())
        player.commit(block_span)
        q, k, v = random(0, commit, geometry, (0, 1))
        for sample, reference in enumerate(references):
            reference.blocks.append((block_span.start, q[sample], k[sample], v[sample]))
    return worst


@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("compressor", ["pool", "none"])
@pytest.mark.parametrize("archive", ["device", "host"])
def test_equals_the_slow_version(block, compressor, archive):
    assert compare({"compressor": compressor, "archive": archive}, block=block) < 1e-4
    if block > 2:
        assert compare({"compressor": compressor, "archive": archive, "mid_span": 2.0}, block=block, span=2.0) < 1e-4


@pytest.mark.parametrize(
    "wrong", [{"positions": "absolute"}, {"selection": "recency"}, {"mid_span": 2.0}, {"spatial": "compact"}]
)
def test_the_slow_version_notices_other_settings(wrong):
    assert compare(wrong, block=4) > 1e-3


def filled_bank(num_blocks=6, tokens=5, on_host=False):
    geometry = make_geometry(3, batch=2)
    bank = _Bank(geometry, num_places=num_blocks, block_tokens=tokens, on_host=on_host)
    starts = [3 * i for i in range(num_blocks)]
    bank.places = {start: place for place, start in enumerate(starts)}
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(2, num_blocks, 2, tokens, 2, 16, generator=generator)
    for start, k, v in zip(starts, *kv, strict=True):
        bank.put(0, start, k, v)
    return bank, starts, kv[0]


@pytest.mark.parametrize("num_heads", [1, 2])
def test_key_sums_give_the_naive_score(num_heads):
    bank, starts, keys = filled_bank()
    q = torch.randn(2, 7, 2, 16, generator=torch.Generator().manual_seed(1))
    naive = torch.einsum("bihd,nbjhd->bn", q[:, :, :num_heads], keys[..., :num_heads, :]) / (num_heads * 4.0)
    assert torch.allclose(bank.query_scores(0, starts, q.sum(1), num_heads), naive, atol=1e-4)
    backwards = bank.query_scores(0, starts[::-1], q.sum(1), num_heads)
    assert torch.allclose(backwards.flip(1), naive, atol=1e-4)
    assert not torch.allclose(backwards, naive, atol=1e-1)


def test_softmax_mass_is_attention():
    bank, starts, keys = filled_bank()
    q = torch.randn(2, 7, 2, 16, generator=torch.Generator().manual_seed(1))
    logits = torch.einsum("bihd,nbjhd->bhinj", q, keys) / 4.0
    naive = logits.flatten(-2).softmax(-1).unflatten(-1, (6, 5)).sum(-1).mean(dim=(1, 2))
    masses = bank.softmax_masses(0, starts, q, 2)
    assert torch.allclose(masses, naive, atol=1e-6) and torch.allclose(masses.sum(1), torch.ones(2))


def test_pooling_is_exact_on_unrotated_keys_and_not_on_rotated_ones():
    """Identical tokens have themselves as mean; rotated they would partly cancel."""
    size, cells = (4, 8, 8), (2, 2, 2)
    x = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(2)).expand(1, 256, 2, 16)
    pooled = pool_tokens(x, size, cells)
    assert torch.allclose(pooled, x[:, :8], atol=1e-6)
    places = cell_coordinates([0.0], cells=size, size=size)
    rotated = pool_tokens(rotate(x, places, frequencies=axis_frequencies(16)), size, cells)
    assert rotated.norm() < 0.95 * pooled.norm()


def test_the_network_at_published_sizes():
    network = LatentCompressor(16, 1536).to("meta")
    latents = torch.empty(1, 4, 16, 60, 104, device="meta")
    assert network(latents, (2, 7, 13)).shape == (1, 1536, 2, 7, 13)
    assert network(latents[:, :3], (1, 7, 13)).shape == (1, 1536, 1, 7, 13)
    channels = [stage.out_channels for stage in network.stages]
    assert channels == [32, 128, 512, 2048]


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_the_network_starts_at_zero_and_learns(frames):
    network = LatentCompressor(12, 24, (4, 6, 8, 8))
    made = network(torch.randn(2, frames, 12, 8, 8), (max(1, frames // 2), 2, 2))
    assert made.shape == (2, 24, max(1, frames // 2), 2, 2) and not made.any()
    made.sum().backward()
    assert network.projection.bias.grad.any()


def test_weights_round_trip(tmp_path):
    network = LatentCompressor(12, 24, (4, 6, 8))
    torch.nn.init.normal_(network.projection.weight)
    save_file({k: v.half() for k, v in network.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = load_compressor(str(tmp_path / "w.safetensors"), "hr", torch.device("cpu"))
    x = torch.randn(1, 3, 12, 8, 8)
    assert torch.allclose(loaded(x, (1, 2, 2)), network(x, (1, 2, 2)), atol=1e-2)
    assert not any(p.requires_grad for p in loaded.parameters())
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no compressor"):
        load_compressor(str(tmp_path / "other.safetensors"), "hr", torch.device("cpu"))
    with pytest.raises(ValueError, match="does not exist"):
        load_compressor("large", "hr", torch.device("cpu"))


def test_a_clip_pooled_otherwise_is_refused():
    state = make_policy(SMALL | {"compressor": "lr"}).start(make_geometry(4, grid=(4, 4), layers=1))
    kv = torch.zeros(1, 64, 2, 16)
    for index in range(2):
        state.commit(0, Pass("commit", index, 4 * index, 4), kv, kv, kv)
    with pytest.raises(ValueError, match="has 3 tokens, its place 8"):
        state.commit(0, Pass("encode", 1, 4, 2, grid=(2, 2)), kv[:, :3], kv[:, :3], kv[:, :3])
