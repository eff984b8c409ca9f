"""The footprint of a policy, against the tensors of a live cache."""

from dataclasses import replace

import pytest
import torch
from policy_driver import wan_geometry

from longtake.cache import BlockTrace, Geometry, KVCache, Pass, make_policy
from longtake.cache.footprint import footprint
from longtake.cache.simulation import job_shape

GEOMETRY = Geometry(num_layers=3, num_heads=2, head_dim=24, num_rows=4, num_columns=6, frames_per_block=3)
POLICIES = {
    "attention_sink": {"policy": "attention_sink"},
    "deep_forcing": {
        "policy": "deep_forcing",
        "num_context_frames": 15,
        "num_budget_frames": 12,
        "num_sink_frames": 6,
    },
    "forcing_kv": {"policy": "forcing_kv", "heads": [[], [0], [1]]},
    "pack": {"policy": "pack", "num_sink_frames": 3, "num_recent_frames": 3, "num_selected_blocks": 2},
    "encoded pack": {"policy": "pack", "num_sink_frames": 3, "num_selected_blocks": 2, "compressor": "lr"},
    "full": {"policy": "full"},
    "memrope": {"policy": "memrope"},
    "rolling_sink": {"policy": "rolling_sink"},
    "tempcache": {"policy": "tempcache"},
    "int8": {"policy": "quantized", "bits": 8},
    "int4": {"policy": "quantized", "bits": 4, "inner": {"policy": "full"}},
}
NUM_BLOCKS = 8


def live_cache(policy, geometry, num_blocks):
    """A real cache on the CPU, its tensors full of numbers."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(policy, geometry, attention=lambda q, k, v, bias=None: torch.zeros_like(q))
    g, cache.most_stored = geometry, 0

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
        cache.most_stored = max(cache.most_stored, cache.stats().num_bytes)
    return cache


def storages(value, found=None):
    """Bytes of every tensor storage that an object of ours holds, without what buffers say of themselves."""
    found = {} if found is None else found
    if isinstance(value, torch.Tensor):
        found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for part in value.values():
            storages(part, found)
    elif isinstance(value, list | tuple):
        for part in value:
            storages(part, found)
    elif type(value).__module__.startswith("longtake.") and not isinstance(value, Geometry):
        storages(vars(value), found)
    return found


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("name", POLICIES)
def test_bytes_are_those_of_the_live_tensors(name, dtype, batch):
    policy = make_policy(POLICIES[name])
    geometry = replace(GEOMETRY, dtype=dtype, batch_size=batch, max_frames=3 * NUM_BLOCKS)
    planned = footprint(policy, geometry, num_blocks=NUM_BLOCKS)
    cache = live_cache(policy, geometry, NUM_BLOCKS)
    assert planned.read_sets == cache.num_scratch_bytes
    assert planned.stored == cache.most_stored
    for wrong in ({"batch_size": batch + 1}, {"head_dim": 36}):
        other = footprint(policy, replace(geometry, **wrong), num_blocks=NUM_BLOCKS)
        assert other.read_sets != planned.read_sets and other.stored != planned.stored
    assert (planned.allocated, planned.on_host) == (sum(storages(cache.state).values()), 0)


def test_published_sizes_at_real_size():
    """Wan2.1-1.3B at 832x480: 287.5 MB a frame, 138.0 GB for two minutes of everything, 6.04 GB for 21 frames."""
    window = make_policy({"policy": "sliding_window", "num_context_frames": 21})
    play = footprint(window, wan_geometry(max_frames=480), num_blocks=160)
    assert play.is_steady and play.num_blocks < 12
    assert play.read_sets / 1e9 == pytest.approx(6.04, abs=0.005)
    assert play.stored == 18 * 1560 * 184_320
    everything = footprint(make_policy("full"), wan_geometry(max_frames=480), num_blocks=160)
    assert not everything.is_steady
    assert everything.stored / 1e9 == pytest.approx(138.0, abs=0.05)


def test_far_places_are_the_hosts():
    policy = make_policy({"policy": "offloaded", "inner": POLICIES["attention_sink"]})
    near = footprint(policy.inner, GEOMETRY, num_blocks=NUM_BLOCKS)
    far = footprint(policy, GEOMETRY, num_blocks=NUM_BLOCKS)
    assert far.on_host == far.stored == near.stored and near.on_host == 0
    assert far.allocated == near.allocated - near.stored
    assert far.read_sets == near.read_sets // GEOMETRY.num_layers  # one layer's, for all


def test_an_archive_in_host_memory_is_not_on_the_device():
    near, far = (
        footprint(make_policy(POLICIES["pack"] | {"archive": place}), GEOMETRY, num_blocks=NUM_BLOCKS)
        for place in ("device", "host")
    )
    assert near.on_host == 0 < far.on_host
    assert far.allocated + far.on_host == near.allocated and far.read_sets == near.read_sets


def test_a_budget_is_chosen_for_all_layers():
    policy = make_policy({"policy": "budget", "inner": {"policy": "sliding_window"}, "max_bytes": "60KB"})
    chosen = policy.chosen(GEOMETRY)
    assert chosen == policy.choose(GEOMETRY)
    outside = make_policy({"policy": "offloaded", "inner": policy.settings()})
    assert outside.chosen(GEOMETRY).inner == chosen


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
