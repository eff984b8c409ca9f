"""A re-cache in a rollout of a real transformer, against the slow rollout without a cache."""

import pytest
import rollout as reference
import torch
from rollouts import SHAPE, RecordedNoise, embeds, joined

from longtake.pipelines import rollout_latents

STEPS = {"name": "few_step", "timesteps": [1000, 500], "flow_shift": 5.0}
SIGMAS = (1.0, 2.5 / 3)
NUM_FRAMES = 21


def prompt(seed):
    return embeds(2, seed=seed)


def longlive(window, sinks=3, **changes):
    return {"policy": "longlive", "num_context_frames": window, "num_sink_frames": sinks} | changes


def roll(transformer, cache, schedule=(), **settings):
    settings |= {
        "num_frames": NUM_FRAMES,
        "frame_shape": SHAPE,
        "sampler": STEPS,
        "cache": cache,
        "schedule": schedule,
    }
    return joined(rollout_latents(transformer, prompt(2), noise=RecordedNoise(NUM_FRAMES, batch=2), **settings))


@pytest.mark.parametrize(
    ("window", "sinks", "at", "global_sink"),
    [(9, 3, 12, False), (10, 2, 12, False), (12, 3, 9, True), (12, 3, 12, True), (12, 3, 6, False)],
)
def test_what_is_encoded_anew_whole_is_a_rollout_from_there(transformer, window, sinks, at, global_sink):
    """With no sink to outlive it, the last frames might as well be one given block under the new prompt."""
    cache = longlive(window, sinks, global_sink=global_sink)
    ours = roll(transformer, cache, [(at - 1, prompt(3), "recache")])
    num_given = min(window, at)
    given = ours[:, at - num_given : at]

    def reads(start, length):
        return [*range(min(sinks, start)), *range(max(min(sinks, start), start + length - (window - sinks)), start)]

    theirs = reference.rollout(
        transformer,
        prompt(3),
        noise=RecordedNoise(NUM_FRAMES, batch=2, start=at - num_given),
        blocks=[num_given, *[3] * ((NUM_FRAMES - at) // 3)],
        sigmas=SIGMAS,
        reads=reads,
        given=given,
    )
    assert (ours[:, at:] - theirs).abs().max() < 1e-5
    kept = roll(transformer, cache, [(at - 1, prompt(3), "keep")])
    assert torch.equal(kept[:, :at], ours[:, :at]) and (kept[:, at:] - ours[:, at:]).abs().max() > 1e-3


@pytest.mark.parametrize("context_timestep", [0, 100])
def test_a_causal_recache_under_the_same_prompt_changes_nothing(transformer, context_timestep):
    """While all that a frame has seen is encoded anew with it; it runs at the timestep of commit passes."""
    schedule = [(9, prompt(2), "recache")]
    plain = roll(transformer, longlive(12), context_timestep=context_timestep)
    causal = roll(transformer, longlive(12, recache="causal"), schedule, context_timestep=context_timestep)
    assert (causal - plain).abs().max() < 1e-4
    both_ways = roll(transformer, longlive(12), schedule, context_timestep=context_timestep)
    assert (both_ways - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("cache", "event"),
    [
        (longlive(9), "recache"),
        (longlive(9, recache="causal"), "recache"),
        ({"policy": "sliding_window", "num_context_frames": 9}, "recache"),
        ({"policy": "attention_sink", "num_context_frames": 9}, "flush"),
        ({"policy": "infinity_rope", "num_context_frames": 9}, "flush"),
        ({"policy": "infinity_rope", "num_context_frames": 9}, "cut"),
        ({"policy": "anchor", "num_context_frames": 12}, "recache"),
    ],
)
def test_an_event_acts_on_every_video_alike_and_not_before_its_time(transformer, cache, event):
    together = roll(transformer, cache, [(12, prompt(3), event)])
    kept = roll(transformer, cache, [(12, prompt(3), "keep")])
    assert torch.equal(together[:, :12], kept[:, :12])
    assert (together[:, 12:] - kept[:, 12:]).abs().amax((1, 2, 3, 4)).min() > 1e-3
