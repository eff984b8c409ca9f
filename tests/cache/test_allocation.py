"""What a played cache says it allocates, against the tensors of a real one."""

import gc
from dataclasses import replace

import pytest
import torch

from longtake.cache import BlockTrace, Geometry, KVCache, Pass, make_policy
from longtake.cache.allocation import CacheBytes, chosen_policy, held_bytes, play_cache
from longtake.cache.live_bytes import LiveBytes
from longtake.cache.simulation import job_shape

GEOMETRY = Geometry(num_layers=3, num_heads=2, head_dim=24, num_rows=4, num_columns=6, frames_per_block=3)
POLICIES = {
    "attention_sink": {"policy": "attention_sink"},
    "deep_forcing": {
        "policy": "deep_forcing",
        "num_context_frames": 15,
        "num_sink_frames": 6,
        "num_budget_frames": 12,
    },
    "pack": {"policy": "pack", "num_sink_frames": 3, "num_recent_frames": 3, "num_selected_blocks": 2},
    "encoded pack": {"policy": "pack", "num_sink_frames": 3, "num_selected_blocks": 2, "compressor": "lr"},
    "full": {"policy": "full"},
    "memrope": {"policy": "memrope"},
    "rolling_sink": {"policy": "rolling_sink"},
    "int8": {"policy": "quantized", "bits": 8},
    "int4": {"policy": "quantized", "bits": 4, "inner": {"policy": "full"}},
}
NUM_BLOCKS = 8


def live_cache(policy, geometry, num_blocks):
    """A real cache on the CPU, its tensors full of numbers."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(policy, geometry, attention=lambda q, k, v, bias=None: torch.zeros_like(q))
    g = geometry

    def run(pass_):
        rows, columns = pass_.grid or (g.num_rows, g.num_columns)
        shape = (3, g.batch_size, pass_.num_frames * rows * columns, g.num_heads, g.head_dim)
        for layer in range(g.num_layers):
            cache.attend(layer, *torch.randn(shape, generator=generator).to(g.dtype), pass_)

    for index in range(num_blocks):
        start = index * g.frames_per_block
        run(Pass("denoise", index, start, g.frames_per_block))
        run(Pass("commit", index, start, g.frames_per_block))
        latents = torch.zeros(g.batch_size, g.frames_per_block, 16, 2 * g.num_rows, 2 * g.num_columns)
        for job in cache.end_block(BlockTrace(index, start, latents)):
            num_frames, grid = job_shape(job, g)
            run(Pass("encode", index, job.start_frame, num_frames, label=job.label, grid=grid))
    return cache


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("name", POLICIES)
def test_bytes_are_those_of_the_live_tensors(name, dtype, batch):
    policy = make_policy(POLICIES[name])
    geometry = replace(GEOMETRY, dtype=dtype, batch_size=batch, max_frames=3 * NUM_BLOCKS)
    planned = play_cache(policy, geometry, num_blocks=NUM_BLOCKS).end
    cache = live_cache(policy, geometry, NUM_BLOCKS)
    assert planned.read_sets == cache.num_scratch_bytes
    assert planned.stored == cache.stats().num_bytes
    assert (planned.allocated, planned.on_host) == held_bytes(cache.state)


def test_a_wrong_plan_is_noticed():
    """The comparison itself: another length, window or batch is another number."""
    right = replace(GEOMETRY, max_frames=3 * NUM_BLOCKS)
    policy = make_policy(POLICIES["attention_sink"])
    cache = live_cache(policy, right, NUM_BLOCKS)
    wrong = [
        play_cache(policy, replace(right, batch_size=2), num_blocks=NUM_BLOCKS),
        play_cache(policy, replace(right, num_layers=4), num_blocks=NUM_BLOCKS),
        play_cache(replace(policy, num_context_frames=15), right, num_blocks=NUM_BLOCKS),
        play_cache(policy, right, num_blocks=1),
    ]
    for play in wrong:
        found = (play.end.read_sets, play.end.stored, play.end.allocated)
        assert found != (cache.num_scratch_bytes, cache.stats().num_bytes, held_bytes(cache.state)[0])


def test_published_sizes_at_real_size():
    """Wan2.1-1.3B at 832x480: 287.5 MB a frame, 138.0 GB for two minutes of everything, 6.04 GB for 21 frames."""
    real = Geometry(
        num_layers=30,
        num_heads=12,
        head_dim=128,
        num_rows=30,
        num_columns=52,
        frames_per_block=3,
        dtype=torch.bfloat16,
    )
    window = make_policy({"policy": "sliding_window", "num_context_frames": 21})
    play = play_cache(window, replace(real, max_frames=480), num_blocks=160)
    assert play.is_steady and play.num_blocks < 12
    assert play.most.read_sets / 1e9 == pytest.approx(6.04, abs=0.005)
    assert play.most.stored == 18 * 1560 * 184_320
    everything = play_cache(make_policy("full"), replace(real, max_frames=480), num_blocks=160)
    assert not everything.is_steady
    assert everything.end.stored / 1e9 == pytest.approx(138.0, abs=0.05)


def test_far_places_are_the_hosts():
    policy = make_policy({"policy": "offloaded", "inner": POLICIES["attention_sink"]})
    near = play_cache(policy.inner, GEOMETRY, num_blocks=NUM_BLOCKS).end
    far = play_cache(policy, GEOMETRY, num_blocks=NUM_BLOCKS).end
    assert far.on_host == far.stored == near.stored and near.on_host == 0
    assert far.allocated == near.allocated - near.stored
    assert far.read_sets == near.read_sets // GEOMETRY.num_layers  # one layer's, for all


def test_a_budget_is_chosen_for_all_layers():
    policy = make_policy({"policy": "budget", "inner": {"policy": "sliding_window"}, "max_bytes": "60KB"})
    chosen = chosen_policy(policy, GEOMETRY)
    assert chosen == policy.choose(GEOMETRY)
    outside = make_policy({"policy": "offloaded", "inner": policy.settings()})
    assert chosen_policy(outside, GEOMETRY).inner == chosen


def test_policies_made_for_all_layers_are_played_in_all():
    policy = make_policy({"policy": "forcing_kv", "heads": [[], [0], [1]]})
    geometry = replace(GEOMETRY, max_frames=3 * NUM_BLOCKS)
    planned = play_cache(policy, geometry, num_blocks=NUM_BLOCKS).end
    cache = live_cache(policy, geometry, NUM_BLOCKS)
    assert planned.read_sets == cache.num_scratch_bytes and planned.stored == cache.stats().num_bytes


def test_live_bytes_count_storages_once_and_forget_what_is_gone():
    old = torch.zeros(100)
    with LiveBytes("cpu") as live:
        assert old[:50].sum().nbytes  # a view of something older, and four bytes
        x = torch.zeros(1000)
        views = [x[:10], x.view(10, 100).T]
        x += 1
        assert live.now == 4000
        y = x * 2
        assert live.now == live.peak == 8000
        del y
        gc.collect()
        assert (live.now, live.peak) == (4000, 8000)
        live.restart()
        assert live.peak == 4000
        x.copy_(torch.ones(1000))
        assert (live.now, live.peak) == (4000, 8000)
        del views


def test_sizes_extend_by_a_layer():
    one, two = CacheBytes(1, 2, 0, 4, 5), CacheBytes(2, 4, 0, 8, 5)
    assert one.extended(two, 2) == CacheBytes(3, 6, 0, 12, 5)
    assert one.on_device == 11


def test_unbounded_read_sets_end_with_the_video():
    num_blocks = 5  # doubling would go to eight
    geometry = replace(GEOMETRY, max_frames=3 * num_blocks)
    whole = 2 * geometry.num_layers * geometry.num_heads * geometry.head_dim * geometry.dtype.itemsize
    whole *= 3 * num_blocks * geometry.tokens_per_frame
    known, unknown = (
        live_cache(make_policy("full"), g, num_blocks).num_scratch_bytes
        for g in (geometry, replace(geometry, max_frames=None))
    )
    assert known <= whole < unknown
