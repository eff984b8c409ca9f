"""Blocks that are denoised together: against a slow version without a cache, and what the window means."""

import pytest
import rolling_window as reference
import torch
from rollouts import SHAPE, RecordedNoise, assert_resumes_everywhere, embeds, given_latents, joined

from longtake.models.causal import CausalTransformer
from longtake.pipelines import LatentRollout, PromptSwitch

STEPS = {"name": "rolling_window", "timesteps": [1000, 600, 300]}
SIGMAS = (1.0, 3 / 3.4, 1.5 / 2.2)
ROLLING = {"policy": "rolling_forcing", "num_context_frames": 15, "num_sink_frames": 3}


def make(transformer, batch=1, schedule=(), **settings):
    settings = {"num_frames": 15, "frame_shape": SHAPE, "sampler": STEPS, "cache": "full"} | settings
    rollout = LatentRollout(transformer, embeds(batch), **({"noise": RecordedNoise(batch=batch)} | settings))
    for switch in schedule:
        rollout.add_switch(switch)
    return rollout


def roll(transformer, batch=1, **settings):
    return joined(make(transformer, batch, **settings))


def slow(transformer, batch=1, **settings):
    settings = {"blocks": [3] * 5, "sigmas": SIGMAS} | settings
    return reference.rollout(transformer, embeds(batch), noise=RecordedNoise(batch=batch), **settings)


@pytest.mark.parametrize(
    ("fast", "obvious"),
    [
        ({}, {}),
        ({"batch": 2, "context_timestep": 60}, {"batch": 2, "context_timestep": 60.0}),
        ({"frames_per_block": 1, "num_frames": 6}, {"blocks": [1] * 6}),
        ({"frames_per_block": 4, "num_frames": 16}, {"blocks": [4] * 4}),
        ({"num_frames": 6}, {"blocks": [3] * 2}),
        ({"num_frames": 3}, {"blocks": [3]}),
        ({"first_block_frames": 1, "num_frames": 13}, {"blocks": [1, 3, 3, 3, 3]}),
    ],
)
def test_equals_a_rollout_without_a_cache(transformer, fast, obvious):
    assert (roll(transformer, **fast) - slow(transformer, **obvious)).abs().max() < 5e-5


@pytest.mark.parametrize("joint", [True, False])
def test_given_latents_are_read_from_the_first_window_on(transformer, joint):
    given = given_latents(6)
    ours = roll(transformer, initial_latents=given, num_frames=9, context_timestep=40)
    theirs = slow(transformer, given=given, context_timestep=40.0, joint=joint)
    error = (ours - theirs).abs().max()
    assert error < 5e-5 if joint else error > 1e-2


def test_a_window_of_one_level_is_a_rollout_of_single_blocks(transformer):
    one = roll(transformer, sampler={"name": "rolling_window", "timesteps": [1000]})
    few = roll(transformer, sampler={"name": "few_step", "timesteps": [1000]})
    assert torch.equal(one, few)


def test_a_full_window_takes_one_forward_and_one_commit_per_block(transformer, monkeypatch):
    seen, plain = [], CausalTransformer.flow

    def flow(self, x, *, segments, **rest):
        (segment,) = segments
        seen.append((segment.pass_.kind, segment.pass_.start_frame, x.shape[1], segment.timestep))
        return plain(self, x, segments=segments, **rest)

    monkeypatch.setattr(CausalTransformer, "flow", flow)
    noise = RecordedNoise()
    roll(transformer, noise=noise)
    t = [1000 * sigma for sigma in SIGMAS]
    windows = [(0, t[:1]), (0, t[1::-1]), (0, t[::-1]), (3, t[::-1]), (6, t[::-1]), (9, t[:0:-1]), (12, t[2:])]
    denoised = [(start, count, level) for kind, start, count, level in seen if kind == "denoise"]
    assert [(start, count) for start, count, _ in denoised] == [(start, 3 * len(ts)) for start, ts in windows]
    for (_, _, level), (_, ts) in zip(denoised, windows, strict=True):
        assert level == pytest.approx(tuple(ts))
    assert [(start, count, level) for kind, start, count, level in seen if kind == "commit"] == [
        (start, 3, 0.0) for start in (0, 3, 6, 9)
    ]
    assert noise.asked == [(i, 3 * i, 3) for i in range(5)]


@pytest.mark.parametrize("cache", [ROLLING, ROLLING | {"commit": "keep_sinks"}, "full", "attention_sink"])
def test_a_video_goes_on_bit_for_bit_from_any_block(transformer, cache):
    cache = {"policy": cache, "num_context_frames": 15} if cache == "attention_sink" else cache
    settings = {"cache": cache, "num_frames": 21, "schedule": [PromptSwitch(9, 3 * embeds())]}
    whole = list(make(transformer, **settings))
    assert [block.start_frame for block in whole] == list(range(0, 21, 3))
    assert [block.prompt_index for block in whole] == [-1] * 3 + [0] * 4
    assert_resumes_everywhere(lambda: make(transformer, **settings), whole)


@pytest.mark.parametrize(("wrapper", "error"), [("offloaded", 0.0), ("quantized", 2e-3)])
def test_wrappers_take_windows_where_their_inner_policy_does(transformer, wrapper, error):
    plain = roll(transformer, cache=ROLLING, num_frames=21)
    assert (roll(transformer, cache={"policy": wrapper, "inner": ROLLING}, num_frames=21) - plain).abs().max() <= error
    with pytest.raises(ValueError, match=f"'{wrapper}' serves one block at a time"):
        make(transformer, cache={"policy": wrapper, "inner": "pack"})


def test_the_hook_sees_every_block_at_its_own_level(transformer):
    rollout, seen = make(transformer, num_frames=9), []

    def hook(step_index, timestep, x0, prompt_embeds):
        seen.append((step_index, round(timestep), x0.shape[1]))
        return 0 * x0

    rollout.on_step_end = hook
    assert all(block.latents.abs().max() == 0 for block in rollout)
    levels = [round(1000 * sigma) for sigma in SIGMAS]
    assert [(step, timestep) for step, timestep, _ in seen] == [
        (step, levels[step]) for step in (0, 1, 0, 2, 1, 0, 2, 1, 2)
    ]
    assert {count for _, _, count in seen} == {3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "pack"}, "'pack' serves one block at a time.*full.*rolling_forcing"),
        ({"cache": {"policy": "attention_sink", "num_context_frames": 11}}, "a block of 9 frames: use 12 or more"),
        ({"cache": ROLLING | {"num_context_frames": 11}}, "a block of 9 frames: use 12 or more"),
        (
            {"cache": "attention_sink", "schedule": [PromptSwitch(3, torch.zeros(1, 7, 16), "flush")]},
            "no moment for the prompt event 'flush'",
        ),
    ],
)
def test_what_a_window_cannot_do_is_refused(transformer, settings, message):
    with pytest.raises(ValueError, match=message):
        make(transformer, **settings)


def test_a_state_of_another_sampler_is_refused(transformer):
    few = make(transformer, sampler={"name": "few_step"})
    few.next_block()
    with pytest.raises(ValueError, match="written with another sampler"):
        make(transformer).load_state_dict(*few.state_dict())


def test_the_policy_serves_single_blocks_too(transformer):
    rolling = roll(transformer, cache=ROLLING, sampler={"name": "few_step"}, num_frames=12)
    sink = {"policy": "attention_sink", "num_context_frames": 15, "positions": "absolute"}
    assert (rolling - roll(transformer, cache=sink, sampler={"name": "few_step"}, num_frames=12)).abs().max() < 1e-5
