"""The benchmarks: what they measure and count, against PyTorch's own counter and a size for the CPU; never a time."""

import os
from dataclasses import replace

import pytest
import torch
from block_attention import signature
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.evaluation import Case, measure_case
from benchmarks.plans import Clock, measure_plans, timed
from benchmarks.policies import policies_to_measure, steady_state
from benchmarks.rollouts import BLOCK, NUM_CONTEXT_FRAMES, Size, block_times
from benchmarks.width import CLEAR, DTYPES, POLICIES, Block, is_within, measure_block
from benchmarks.width_plan import SMALL, plan_width
from longtake import cache
from longtake.attention import fastest
from longtake.attention.geometry import make_geometry
from longtake.attention.policies.radial import Radial
from longtake.cache import Geometry, make_policy
from longtake.models.causal import fitting_threads
from longtake.pipelines import LatentRollout
from longtake.samplers import SeededNoise, make_sampler

SMALLER = replace(SMALL, num_filled=5)
POLICY = {"policy": "attention_sink", "num_context_frames": 9, "num_sink_frames": 3}


def count_flops(function, *args):
    # PyTorch counts attention on accelerators only; its formula is the same on the CPU.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {attention: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function(*args)
    return counter.get_total_flops()


def test_counted_operations_are_those_of_a_block():
    size = Size(width=48, num_heads=2, num_layers=2, side=4, num_text_tokens=8)
    rollout = LatentRollout(
        size.build(torch.float32),
        torch.zeros(1, 8, 64),
        num_frames=NUM_CONTEXT_FRAMES + 2 * BLOCK,
        frame_shape=(16, 8, 8),
        cache={"policy": "sliding_window", "num_context_frames": NUM_CONTEXT_FRAMES},
        noise=SeededNoise([0]),
    )
    for _ in range(NUM_CONTEXT_FRAMES // BLOCK + 1):
        rollout.next_block()
    assert count_flops(rollout.next_block) == pytest.approx(size.block_flops(), rel=0.01)


def test_only_full_windows_are_timed():
    size = Size(width=48, num_heads=2, num_layers=1, side=2)
    times = block_times(size, torch.bfloat16)
    assert all(next(times) > 0 for _ in range(2))


@pytest.mark.parametrize(
    ("num_tokens", "waiting", "expected"),
    [
        (48, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}, 1),
        (48, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}, 2),
        (48, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "INFINITE"}, 2),
        (48, {}, 2),
        (10_000, {"OMP_WAIT_POLICY": "PASSIVE"}, 2),
    ],
)
def test_small_forwards_take_one_thread_where_the_others_sleep(num_tokens, waiting, expected, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
        if name in waiting:
            monkeypatch.setenv(name, waiting[name])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with (
            pytest.raises(RuntimeError, match="stop"),
            fitting_threads(width=192, num_tokens=num_tokens, device=torch.device("cpu")),
        ):
            assert torch.get_num_threads() == expected
            raise RuntimeError("stop")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_every_pass_is_counted():
    """Against PyTorch's own counter, over the whole block."""
    policy, sampler = make_policy(POLICY), make_sampler("few_step")
    planned = plan_width(SMALLER, policy, torch.float32, num_steps=4)
    block = Block(SMALLER, policy, torch.float32, fastest(torch.device("cpu"), torch.float32))
    block.sample(sampler)  # text keys and values are made once, and are not counted
    block.seconds.clear()
    counted = count_flops(block.sample, sampler)
    assert len(block.seconds) == len(planned.passes) == 5
    expected = sum(work.linear + work.attended for work in planned.passes)
    assert counted == pytest.approx(expected, rel=0.01)


def test_the_first_pass_moves_more_for_it_gathers():
    works = plan_width(SMALLER, make_policy(POLICY), torch.float32, num_steps=4).passes
    assert works[0].moved > works[1].moved == works[2].moved
    assert all(work.attended == works[0].attended for work in works)


@pytest.mark.skipif(not CLEAR.exists(), reason="this system does not tell a process's most memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POLICIES)
def test_keys_and_values_are_as_planned(name, dtype):
    settings = {"deep_forcing": {"num_context_frames": 12, "num_sink_frames": 3, "num_budget_frames": 9}}
    policy = make_policy({"policy": name, **settings.get(name, {})})
    row = measure_block(SMALLER, policy, getattr(torch, dtype))
    measured, planned = row["kv_bytes"]
    assert measured == planned > 0
    assert all(value > 0 for pair in (row["peak_bytes"], row["seconds"]) for value in pair[1:])


def test_what_is_off_by_a_fifth_is_noticed():
    row = {"kv_bytes": [100, 100], "peak_bytes": [95, 100], "seconds": [1.1, 1.0]}
    assert is_within(row)
    for figure in row:
        assert not is_within(row | {figure: [120, 100]})
        assert not is_within(row | {figure: [80, 100]})


def test_case_is_measured_in_its_own_process(tmp_path):
    before = dict(os.environ)
    case = Case(height=32, width=48, seconds=1, groups=("weight_free",), workers=1)
    record = measure_case(case, tmp_path)
    assert record["num_metrics"] == 25 and record["frames_per_second"] > 0 and record["peak_mb"] > 50
    assert dict(os.environ) == before


def test_a_timed_policy_makes_the_same_plans_and_builds_each_once():
    policy, clock = Radial(block_size=4, thin_below=8, dense_layers=0, dense_steps=0, dense_blocks=0), Clock()
    watched = timed(policy, clock)
    geometry = make_geometry(9, (4, 4), block_frames=3)
    plans = [watched.plan(None, None, geometry) for _ in range(3)]
    assert signature(plans[0]) == signature(policy.plan(None, None, geometry))
    assert clock.calls == {"plan": 3, "build": 1} and watched.settings() == policy.settings()


def test_a_rollout_builds_few_plans_and_looks_them_up():
    record = measure_plans(seconds=2.0)
    radial, light = record["radial-30"], record["light_forcing-30"]
    assert radial["calls"] == light["calls"] > 20 * radial["plans"] > 0 == light["plans"]
    assert radial["choosing"] is None and light["looking_up"] is None
    assert 0 < radial["building"] < radial["seconds"] and 0.2 < radial["density"] < 1


def test_every_policy_is_measured():
    assert policies_to_measure().keys() == cache.POLICIES.keys()


@pytest.mark.parametrize(
    ("policy", "num_frames", "grows"),
    [
        ({"policy": "sliding_window", "num_context_frames": 9}, 9, False),
        ({"policy": "attention_sink", "num_context_frames": 11, "num_sink_frames": 3}, 11, False),
        ({"policy": "quantized", "inner": {"policy": "sliding_window", "num_context_frames": 12}}, 12, False),
        ("full", 3 * 48, True),
    ],
)
def test_the_window_it_is_compared_with_is_as_long(policy, num_frames, grows):
    geometry = Geometry(num_layers=2, num_heads=2, head_dim=128, num_rows=16, num_columns=16, frames_per_block=3)
    steady = steady_state(make_policy(policy), geometry)
    assert (steady.num_frames, steady.grows) == (num_frames, grows)
