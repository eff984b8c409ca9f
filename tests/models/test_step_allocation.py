"""Heterogeneous step allocation: the budget is met, straight paths stay exact, skipped tokens are attended to."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_allocation_loop import denoise

from longtake.models.bidirectional import StepAllocation, _TokenCache, relative_change

SIGMAS = [1 - step / 40 for step in range(41)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def euler(velocity, x, sigmas):
    for sigma, after in pairwise(sigmas):
        x = x + (after - sigma) * velocity(x, sigma, None)
    return x


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    target=st.floats(0.3, 1.0),
    num_warmup_steps=st.integers(2, 6),
    num_steps=st.integers(20, 60),
    num_tokens=st.integers(50, 400),
)
def test_the_budget_is_met(target, num_warmup_steps, num_steps, num_tokens):
    allocation = StepAllocation(target=target, num_warmup_steps=num_warmup_steps)
    try:
        shares = allocation.shares(num_steps)
    except ValueError:
        # Even a stride of 8 computes every token in the warm-up and in the last step.
        assert target * num_steps < num_warmup_steps + (num_steps - num_warmup_steps) / 8 + 2
        return
    assert math.isclose(sum(shares), 1) and min(shares) >= 0
    ratios = [b / a for a, b in pairwise(shares) if a > 1e-9 and b > 1e-9]
    assert all(math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios)
    strides = allocation.assign(random(num_tokens).abs(), num_steps)
    computed = num_warmup_steps * num_tokens
    for step in range(num_warmup_steps, num_steps):
        active = allocation.active(strides, step, num_steps)
        computed += num_tokens if active is None else len(active)
    # Shares are whole tokens: each edge between two groups is half a token off at most.
    assert computed / (num_steps * num_tokens) == pytest.approx(target, abs=3 / num_tokens)


def test_tokens_that_change_most_have_the_smallest_stride():
    change = torch.tensor([0.1, 3.0, 0.2, 2.0, 0.05, 1.0, 0.5, 0.4])
    strides = StepAllocation(target=0.5).assign(change, 40)
    by_change = strides[change.argsort(descending=True)]
    assert torch.equal(by_change, by_change.sort().values) and by_change.unique().numel() > 2


def test_change_is_relative_and_the_mean_of_the_batch():
    before = torch.tensor([[[1.0, -1.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 4.0]]])
    after = torch.tensor([[[2.0, -1.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 2.0]]])
    assert relative_change(after, before).tolist() == pytest.approx([0.25, 0.25], abs=1e-5)


def test_all_tokens_in_all_steps_is_euler():
    def velocity(x, sigma, active):
        assert active is None
        return torch.sin(x) + sigma

    x = random(2, 30, 4)
    found, share = denoise(velocity, x, SIGMAS, allocation=StepAllocation(target=1.0))
    assert share == 1.0 and torch.allclose(found, euler(velocity, x, SIGMAS), atol=1e-5)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.75])
def test_tokens_at_constant_velocity_lose_nothing(target):
    """Straight paths are exact however few steps they have: skipped stretches are made up for in one."""
    speed = random(2, 120, 4)

    def velocity(x, sigma, active):
        return speed if active is None else speed[:, active]

    x = random(2, 120, 4, seed=1)
    found, share = denoise(velocity, x, SIGMAS, allocation=StepAllocation(target=target))
    assert share == pytest.approx(target, abs=0.02)
    assert torch.allclose(found, x - speed, atol=1e-5)


def test_steps_go_where_tokens_change():
    """Half of the tokens turn quickly: they are computed in nearly every step, and the result is near the full one."""
    rate = torch.cat([torch.full((60, 1), 9.0), torch.full((60, 1), 0.01)])
    calls = torch.zeros(120)

    def velocity(x, sigma, active):
        chosen = torch.arange(120) if active is None else active
        calls[chosen] += 1
        return torch.sin(rate[chosen] * sigma + x[:, chosen])

    x = random(1, 120, 4)
    allocation = StepAllocation(target=0.5, strides=(1, 8))
    found, share = denoise(velocity, x, SIGMAS, allocation=allocation)
    assert calls[:60].mean() > 1.5 * calls[60:].mean() and share == pytest.approx(0.5, abs=0.02)
    exact = euler(velocity, x, SIGMAS)
    error = (found - exact).abs().mean()
    swapped = torch.cat([found[:, 60:], found[:, :60]], dim=1)
    assert error < 0.02 < (swapped - exact).abs().mean()


def test_active_tokens_attend_to_skipped_ones_from_the_cache():
    """One attention layer: with keys that are not stale, the outputs of active tokens are those of the whole."""
    cache, q, k, v = _TokenCache(), *(random(1, 50, 2, 8, seed=seed) for seed in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    whole = attend(*(x.transpose(1, 2) for x in (q, *cache.update(0, k, v, None)))).transpose(1, 2)
    active = torch.tensor([3, 4, 17, 49])
    keys, values = cache.update(0, k[:, active], v[:, active], active)
    some = attend(*(x.transpose(1, 2) for x in (q[:, active], keys, values))).transpose(1, 2)
    assert torch.allclose(some, whole[:, active], atol=1e-6)
    moved = random(1, 4, 2, 8, seed=9)
    keys, _ = cache.update(0, moved, moved, active)
    assert torch.equal(keys[:, active], moved) and torch.equal(keys[:, 5], k[:, 5])
    assert torch.equal(k[:, active], random(1, 50, 2, 8, seed=1)[:, active]), "what was given is not written to"
    with pytest.raises(ValueError, match="layer 3 has no keys"):
        cache.update(3, moved, moved, active)


def test_the_state_given_is_left_alone():
    x = random(1, 40, 4)
    kept = x.clone()
    denoise(lambda x, sigma, active: x if active is None else x[:, active], x, SIGMAS, allocation=StepAllocation())
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"target": 0.0}, "target=0.0"),
        ({"num_warmup_steps": 1}, "num_warmup_steps=1 must be 2 or more"),
        ({"strides": (2, 2)}, r"strides=\[2, 2\]"),
    ],
)
def test_bad_settings_are_named(values, match):
    with pytest.raises(ValueError, match=match):
        StepAllocation(**values)


def test_targets_out_of_reach_are_named():
    with pytest.raises(ValueError, match=r"target=0.1 cannot be met in 40 steps, only 0\.\d+ to 1\.000"):
        StepAllocation(target=0.1).shares(40)
    with pytest.raises(ValueError, match="leaves none of 4 steps"):
        denoise(lambda *_: None, torch.zeros(1, 2, 2), [1, 0.7, 0.4, 0.2, 0], allocation=StepAllocation())
