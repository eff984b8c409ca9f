"""Every preset under configs/model loads, its sampler and cache are made, and its numbers are the published ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler

from longtake.cache import make_policy
from longtake.configs.families import family_names, load_family
from longtake.configs.loader import load_preset, load_run
from longtake.samplers import FewStep, MultiStep, RollingWindow, make_sampler

ROOT = Path(__file__).resolve().parents[2]
FOUR = [1000, 937.5, 833.3333, 625]
FIVE = [1000, 952.3810, 882.3529, 769.2308, 555.5556]

# (levels of the first block, of later blocks), frames per block, latent frames in the cache, sinks.
PUBLISHED = {
    "self_forcing": (FOUR, FOUR, 3, None, None),
    "infinite_forcing": (FOUR, FOUR, 3, 6, 1),
    "causal_forcing": (FOUR, FOUR, 3, None, None),
    "causal_forcing_framewise": (FOUR, FOUR, 1, None, None),
    "causal_forcing_1step": (FOUR, [1000], 1, None, None),
    "causal_forcing_2step": (FOUR, [1000, 833.3333], 1, None, None),
    "causal_forcing_long": (FOUR, FOUR, 3, 21, 3),
    "rolling_forcing": (FIVE, FIVE, 3, 21, 3),
    "longlive": (FOUR, FOUR, 3, 12, 3),
    "anchor_forcing": (FOUR, FOUR, 3, 15, 3),
    "reward_forcing": (FOUR, FOUR, 3, 9, 3),
    "causvid": ([1000, 757, 522], [1000, 757, 522], 3, None, None),
    "krea_14b": ([1000, 937, 833, 625], [1000, 937, 833, 625], 3, None, None),
}
GUIDED = {"wan": (50, 3.0), "causal_forcing_ar": (50, 3.0), "mini": (4, 4.0)}


def levels(sampler, block_index):
    sigmas = sampler.sigmas if isinstance(sampler, RollingWindow) else sampler.sigmas(block_index)
    return [1000 * sigma for sigma in sigmas]


def test_every_family_is_in_one_of_the_tables():
    assert sorted(PUBLISHED | GUIDED) == family_names()


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_distilled_family_runs_at_its_published_levels_and_sizes(name):
    first, later, block, context, sinks = PUBLISHED[name]
    family = load_family(name)
    sampler = make_sampler(family.sampler)
    assert levels(sampler, 0) == pytest.approx(first, abs=1e-3)
    assert levels(sampler, 7) == pytest.approx(later, abs=1e-3)
    assert sampler.guidance_scale == 1.0
    assert (family.frames_per_block, family.context_timestep, family.num_trained_frames) == (block, 0.0, 21)
    cache = family.cache or {}
    assert (cache.get("num_context_frames"), cache.get("num_sink_frames")) == (context, sinks)


@pytest.mark.parametrize("name", sorted(GUIDED))
def test_an_undistilled_family_is_guided(name):
    sampler = make_sampler(load_family(name).sampler)
    assert isinstance(sampler, MultiStep)
    assert (sampler.num_inference_steps, sampler.guidance_scale) == GUIDED[name]


@pytest.mark.parametrize("name", family_names())
def test_a_family_can_be_run_without_naming_cache_or_sampler(name, tmp_path):
    family = load_family(name)
    model = name if family.folder else f"{name}={tmp_path}"
    run = load_run(options={"prompt": "a lighthouse", "model": model})
    sampler, policy = make_sampler(run.sampler), make_policy(run.cache)
    assert run.sampler == family.sampler
    assert policy.name == (family.cache or {"policy": "attention_sink"})["policy"]
    assert all(run.cache[key] == value for key, value in (family.cache or {}).items())
    together = sampler.num_window_blocks * family.frames_per_block
    policy.check(together, family.num_latent_frames(81))
    assert policy.traits.takes_windows or sampler.num_window_blocks == 1


@pytest.mark.parametrize("name", family_names())
def test_a_family_says_where_it_comes_from_and_what_it_may_begin_with(name):
    family = load_family(name)
    assert family.source and family.height % 16 == family.width % 16 == 0
    first = family.first_block_frames or family.frames_per_block
    assert "image" not in family.starts or first == 1, "an image is one latent frame"
    if family.folder is None:
        assert family.size and family.checkpoint.file and family.homepage.startswith("https://")
    adapter = (family.checkpoint.lora_file, family.checkpoint.lora_key, family.checkpoint.lora_alpha)
    assert all(adapter) or not any(adapter)
    text = (ROOT / "configs" / "model" / f"{name}.yaml").read_text()
    assert text.startswith("# ") and yaml.safe_load(text)


def test_licences_that_forbid_something_say_so():
    restricted = {name: load_family(name).licence for name in family_names() if load_family(name).restriction}
    assert restricted == {
        "causvid": "CC-BY-NC-SA-4.0",
        "krea_14b": "CC-BY-NC-SA-4.0",
        "rolling_forcing": "terms of its own",
        "anchor_forcing": "none stated",
    }
    free = {name for name in family_names() if load_family(name).licence == "Apache-2.0"}
    assert free == set(family_names()) - set(restricted) - {"infinite_forcing"}


def test_a_bidirectional_model_makes_one_block():
    family = load_family("wan")
    assert family.num_latent_frames(81) == family.frames_per_block == 21
    with pytest.raises(ValueError, match="rollout of 42 frames"):
        make_policy(family.cache).check(21, family.num_latent_frames(85))


def test_lengths_are_whole_blocks():
    family = load_family("self_forcing")
    assert [family.num_latent_frames(frames) for frames in (1, 9, 10, 81, 961)] == [3, 3, 6, 21, 243]
    first = replace(family, first_block_frames=1)
    assert [first.num_latent_frames(frames) for frames in (1, 2, 13, 14)] == [1, 4, 4, 7]
    assert family.num_latent_frames(81, frames_per_block=4) == 24


def test_fields_alone_go_over_the_familys_own_cache(tmp_path):
    run = load_run(options={"prompt": "x", "model": f"longlive={tmp_path}"}, overrides=["cache.num_sink_frames=2"])
    assert run.cache == load_preset("cache", "longlive") | {"num_sink_frames": 2}
    named = load_run(options={"prompt": "x", "model": f"longlive={tmp_path}", "cache": "full"})
    assert named.cache == load_preset("cache", "full")


def test_levels_that_are_not_warped_are_run_as_they_stand():
    """Every level of CausVid is within half a step of a level of its thousand-step schedule of shift 8."""
    sampler = make_sampler(load_family("causvid").sampler)
    assert isinstance(sampler, FewStep) and not sampler.warp
    schedule = FlowMatchEulerDiscreteScheduler(shift=8.0)
    nearest = [(schedule.timesteps - level).abs().min().item() for level in levels(sampler, 0)]
    assert max(nearest) < 0.5
    warped = FewStep(timesteps=(1000, 757, 522), flow_shift=8.0)
    assert min(abs(a - b) for a, b in zip(levels(warped, 1)[1:], levels(sampler, 1)[1:], strict=True)) > 100


@pytest.mark.parametrize("warp", [True, False])
def test_the_first_block_takes_its_own_steps(warp):
    """Against diffusers' stochastic scheduler, block by block with the same draws."""
    shape, raw = (1, 1, 4, 2, 2), {0: [1000, 750, 500, 250], 1: [1000, 500]}
    sampler = FewStep(timesteps=raw[1], first_block_timesteps=raw[0], flow_shift=5.0, warp=warp)

    def network(x, timestep):
        return torch.sin(3 * x) + 0.001 * timestep

    for block_index in (0, 1, 2):
        steps = raw[min(block_index, 1)]
        start = torch.randn(shape, generator=torch.Generator().manual_seed(block_index))
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0 if warp else 1.0, stochastic_sampling=True)
        scheduler.set_timesteps(sigmas=[step / 1000 for step in steps])
        expected, draws = start, torch.Generator().manual_seed(9)
        for timestep in scheduler.timesteps:
            flow = network(expected, timestep)
            expected = scheduler.step(flow, timestep, expected, generator=draws, return_dict=False)[0]
        seen, again = [], torch.Generator().manual_seed(9)

        def denoise(x, timestep, seen=seen):
            seen.append(timestep)
            return x - timestep / 1000 * network(x, timestep)

        ours = sampler.sample(
            denoise,
            start,
            renoise=lambda step, again=again: torch.randn(shape, generator=again),
            block_index=block_index,
        )
        assert len(seen) == sampler.num_steps(block_index) == len(steps)
        assert (ours - expected).abs().max() < 2e-5


def test_a_first_block_like_all_others_is_another_video():
    x = torch.randn(1, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    arguments = {"renoise": lambda step: torch.zeros_like(x), "block_index": 0}
    own = FewStep(timesteps=(1000,), first_block_timesteps=(1000, 500)).sample(lambda x, t: x.tanh(), x, **arguments)
    assert not torch.equal(own, FewStep(timesteps=(1000,)).sample(lambda x, t: x.tanh(), x, **arguments))


def documented():
    """Rows of docs/models.md by preset: size, block, steps, cache, starts, licence, weights."""
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows if len(row) == 8}


def test_the_documented_table_is_the_presets():
    table = documented()
    assert list(table) == family_names()
    for name, (size, block, steps, own, starts, licence, weights) in table.items():
        family = load_family(name)
        sampler, cache = make_sampler(family.sampler), family.cache
        assert size == (family.size or "own") and int(block) == family.frames_per_block
        assert int(steps.replace(",", " ").split()[0]) == sampler.num_steps(1)
        assert (f"first block {sampler.num_steps(0)}" in steps) == (sampler.num_steps(0) != sampler.num_steps(1))
        assert ("together" in steps) == (sampler.num_window_blocks > 1)
        assert (f"guidance {sampler.guidance_scale:g}" in steps) == (sampler.guidance_scale != 1.0)
        counts = [key for key in ("num_context_frames", "num_sink_frames") if key in (cache or {})]
        sizes = "/".join(str(cache[key]) for key in counts)
        assert own == (f"`{cache['policy']}` {sizes}" if cache else "full history")
        assert starts == ", ".join(("text", *family.starts))
        assert licence == ", ".join(part for part in (family.licence or "not stated", family.restriction) if part)
        assert weights == "bundled" or family.homepage in weights
