"""Samplers against diffusers' schedulers and against flows with a known answer."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.samplers import (
    SAMPLERS,
    FewStep,
    MultiStep,
    RollingWindow,
    SeededNoise,
    make_sampler,
    rolling_window,
    shifted,
)

SHAPE = (2, 3, 4, 2, 2)


def _no_noise(step_index):
    raise AssertionError("an ODE solver draws no noise")


@pytest.mark.parametrize(
    ("sigmas", "timesteps"),
    [
        (FewStep().sigmas(0), [1000, 937.5, 833.3333, 625]),
        (FewStep(flow_shift=8.0).sigmas(0), [1000, 960, 888.8889, 727.2727]),
        (RollingWindow().sigmas, [1000, 952.3810, 882.3529, 769.2308, 555.5556]),
    ],
)
def test_warped_steps(sigmas, timesteps):
    assert [1000 * sigma for sigma in sigmas] == pytest.approx(timesteps, abs=1e-3)


def test_blocks_and_windows_have_their_own_number_of_steps():
    first = FewStep(timesteps=(1000,), first_block_timesteps=(1000, 500))
    assert (first.num_steps(0), first.num_steps(1), first.num_window_blocks) == (2, 1, 1)
    assert RollingWindow().num_window_blocks == RollingWindow().num_steps(7) == 5


def test_few_step_equals_diffusers_stochastic_scheduler():
    """The scheduler draws its noise from a generator; ours gets the same draws."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator)

    def network(x, timestep):
        return torch.sin(3 * x) + 0.001 * timestep

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x, draws = start, torch.Generator().manual_seed(1)
    assert scheduler.timesteps is not None
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x, generator=draws, return_dict=False)[0]

    draws = torch.Generator().manual_seed(1)
    ours = FewStep().sample(
        lambda x, t: x - t / 1000 * network(x, t),
        start,
        renoise=lambda step: torch.randn(SHAPE, generator=draws),
        block_index=0,
    )
    assert (ours - x).abs().max() < 2e-5


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_multi_step_reaches_the_known_clean_block(solver):
    """For one clean point c the flow is (x - c) / sigma: any consistent solver lands on c."""
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    sampler = MultiStep(num_inference_steps=6, solver=solver)
    levels = []

    def denoise(x, timestep):
        levels.append(timestep)
        return clean

    out = sampler.sample(denoise, torch.randn(SHAPE), renoise=_no_noise, block_index=0)
    # UniPC's timesteps are cut to whole numbers as upstream, so x0 is off by one part in a thousand.
    assert (out - clean).abs().max() < {"euler": 1e-5, "unipc": 1e-2}[solver]
    assert len(levels) == sampler.num_steps(0) == 6 and levels == sorted(levels, reverse=True)
    assert levels[0] == pytest.approx(1000 * shifted(0.999, 5.0), abs=1)


def test_unipc_is_more_exact_than_euler_on_a_gaussian():
    """For data N(0, s^2) the probability flow is known: x(1) maps to s * x(1)."""
    spread = 0.5

    def denoise(x, timestep):
        sigma = timestep / 1000
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        return (1 - sigma) * spread**2 / variance * x

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    errors = {}
    for solver in ("euler", "unipc"):
        sampler = MultiStep(num_inference_steps=20, solver=solver, flow_shift=1.0)
        errors[solver] = (sampler.sample(denoise, x, renoise=_no_noise, block_index=0) - spread * x).abs().max().item()
    assert errors["unipc"] < 0.02 < errors["euler"] < 0.3


def test_a_scheduler_per_block_carries_no_history():
    sampler = MultiStep(num_inference_steps=4)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    first, second = (
        sampler.sample(lambda x, t: torch.tanh(x), x, renoise=_no_noise, block_index=block) for block in (0, 1)
    )
    assert torch.equal(first, second)


def test_rolling_window_moves_every_block_to_its_next_level_and_the_last_level_is_clean():
    blocks = [torch.full((1, 3, 2, 2, 2), float(value)) for value in (1, 2, 3)]
    seen = []

    def denoise(parts, timesteps):
        seen.append(timesteps)
        return [10 * part for part in parts]

    def renoise(index):
        return torch.full_like(blocks[index], index)

    found = rolling_window(denoise, blocks, levels=(2, 1, 0), sigmas=(1.0, 0.75, 0.5), renoise=renoise)
    assert seen == [[500.0, 750.0, 1000.0]]
    for block, expected in zip(found, (10, 0.5 * 20 + 0.5 * 1, 0.25 * 30 + 0.75 * 2), strict=True):
        assert torch.allclose(block, torch.tensor(float(expected)))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seeds=st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4), block=st.integers(0, 10_000))
def test_noise_depends_on_seed_block_and_step_alone(seeds, block):
    shape = (len(seeds), 3, 2, 4, 4)
    together = SeededNoise(seeds)
    together.renoise(block, 0, 1, shape)
    for index, seed in enumerate(seeds):
        alone = SeededNoise([seed])
        single = (1, *shape[1:])
        assert torch.equal(alone.initial(block, 3 * block, single)[0], together.initial(block, 0, shape)[index])
        assert torch.equal(alone.renoise(block, 0, 2, single)[0], together.renoise(block, 0, 2, shape)[index])
        assert not torch.equal(alone.initial(block, 0, single), alone.initial(block + 1, 0, single))
        assert not torch.equal(alone.initial(block, 0, single), alone.renoise(block, 0, 0, single))
    noise = SeededNoise([block]).initial(block, 0, (1, 8, 16, 16, 16))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03, "standard normal"


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ("few_stp", "Did you mean 'few_step'"),
        ({"timesteps": [1000]}, "need a key 'name'"),
        ({"name": "few_step", "timestep": [1000]}, "Did you mean 'timesteps'"),
        ({"name": "few_step", "timesteps": [500, 750]}, "must fall"),
        ({"name": "few_step", "timesteps": []}, "must fall"),
        ({"name": "few_step", "timesteps": [1200]}, "must fall"),
        ({"name": "few_step", "timesteps": 1000}, "must be a list"),
        ({"name": "few_step", "flow_shift": 0}, "flow_shift=0"),
        ({"name": "few_step", "flow_shift": "five"}, "must be a number"),
        ({"name": "multi_step", "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"name": "multi_step", "num_inference_steps": 2.5}, "whole number"),
        ({"name": "multi_step", "solver": "eulr"}, "Did you mean 'euler'"),
        ({"name": "multi_step", "max_sigma": 1.0}, "at most 0.9999 for unipc"),
        ({"name": "multi_step", "guidance_scale": -1}, "guidance_scale=-1"),
        ({"name": "rolling_window", "timesteps": [500, 1000]}, "must fall"),
        ({"name": "rolling_window", "guidance_scale": -1}, "guidance_scale=-1"),
    ],
)
def test_bad_settings(settings_, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(settings_)


@pytest.mark.parametrize("name", SAMPLERS)
def test_settings_round_trip(name):
    assert make_sampler(make_sampler(name).settings()) == make_sampler(name)
