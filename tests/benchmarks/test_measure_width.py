"""The figures at true width: what is computed, at a width that tests can afford; never a time."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.width import CLEAR, DTYPES, POLICIES, Block, is_within, measure_block
from benchmarks.width_plan import SMALL, TRUE, plan_width
from longtake.attention import fastest
from longtake.cache import make_policy
from longtake.samplers import make_sampler

SMALLER = replace(SMALL, num_filled=5)
POLICY = {"policy": "attention_sink", "num_context_frames": 9, "num_sink_frames": 3}


def test_the_width_is_true():
    config = TRUE.config
    assert TRUE.dim == config["num_attention_heads"] * config["attention_head_dim"] == 1536
    assert (config["num_attention_heads"], config["num_layers"], TRUE.num_tokens) == (12, 2, 3 * 1560)


def test_every_pass_is_counted():
    """Against PyTorch's own counter, over the whole block."""
    policy, sampler = make_policy(POLICY), make_sampler("few_step")
    planned = plan_width(SMALLER, policy, torch.float32, num_steps=4)
    block = Block(SMALLER, policy, torch.float32, fastest(torch.device("cpu"), torch.float32))
    block.sample(sampler)  # text keys and values are made once, and are not counted
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {attention: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}
    block.seconds.clear()
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        block.sample(sampler)
    assert len(block.seconds) == len(planned.passes) == 5
    expected = sum(work.linear + work.attended for work in planned.passes)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


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
