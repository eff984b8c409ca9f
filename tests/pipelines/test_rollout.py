"""The rollout against a slow version without a cache, and what its arguments mean."""

import pytest
import rollout as reference
import torch
from rollouts import SHAPE, RecordedNoise, embeds, given_latents, joined

from longtake.pipelines import rollout_latents

STEPS = {"name": "few_step", "timesteps": [1000, 500], "flow_shift": 5.0}
SIGMAS = (1.0, 2.5 / 3)


def window(frames, sinks=0):
    """(block start, length) -> frames read before it."""

    def reads(start, length):
        room = frames - length - min(sinks, start)
        return [*range(min(sinks, start)), *range(max(min(sinks, start), start - room), start)]

    return reads


def everything(start, length):
    return range(start)


def sink(frames, sinks):
    sizes = {"num_context_frames": frames, "num_sink_frames": sinks}
    return {"policy": "attention_sink", "positions": "absolute"} | sizes


def roll(transformer, batch=1, noise=None, **settings):
    settings = {"num_frames": 12, "frame_shape": SHAPE, "sampler": STEPS, "cache": "full"} | settings
    noise = noise or RecordedNoise(15, batch=batch)
    return joined(rollout_latents(transformer, embeds(batch), noise=noise, **settings))


def slow(transformer, batch=1, **settings):
    settings = {"blocks": [3] * 4, "sigmas": SIGMAS, "reads": everything} | settings
    return reference.rollout(transformer, embeds(batch), noise=RecordedNoise(15, batch=batch), **settings)


@pytest.mark.parametrize(
    ("fast", "obvious"),
    [
        ({}, {}),
        ({"batch": 2}, {"batch": 2}),
        ({"cache": sink(6, 0)}, {"reads": window(6)}),
        ({"cache": sink(7, 2)}, {"reads": window(7, 2)}),
        ({"frames_per_block": 1, "num_frames": 7, "cache": sink(4, 1)}, {"blocks": [1] * 7, "reads": window(4, 1)}),
        ({"frames_per_block": 4, "cache": sink(9, 3)}, {"blocks": [4] * 3, "reads": window(9, 3)}),
        ({"first_block_frames": 1, "num_frames": 10}, {"blocks": [1, 3, 3, 3]}),
        (
            {"first_block_frames": 1, "num_frames": 13, "cache": sink(6, 1)},
            {"blocks": [1, 3, 3, 3, 3], "reads": window(6, 1)},
        ),
        ({"context_timestep": 60}, {"context_timestep": 60.0}),
    ],
)
def test_equals_a_rollout_without_a_cache(transformer, fast, obvious):
    assert (roll(transformer, **fast) - slow(transformer, **obvious)).abs().max() < 5e-5


@pytest.mark.parametrize(
    ("fast", "obvious"),
    [({"cache": sink(6, 0)}, {}), ({"context_timestep": 60}, {}), ({"cache": sink(6, 1)}, {"reads": window(6)})],
)
def test_a_wrong_setting_differs(transformer, fast, obvious):
    assert (roll(transformer, **fast) - slow(transformer, **obvious)).abs().max() > 1e-3


@pytest.mark.parametrize(("first", "given"), [(None, 3), (None, 6), (1, 1), (1, 4)])
def test_given_latents_fill_the_cache(transformer, first, given):
    """They count as clean at timestep 0, whatever the context timestep."""
    latents = given_latents(given)
    fast = {"initial_latents": latents, "first_block_frames": first, "num_frames": 6, "context_timestep": 40}
    blocks = [first or 3, *[3] * ((given - (first or 3)) // 3), 3, 3]
    noise = RecordedNoise(15)
    ours = roll(transformer, noise=noise, **fast)
    assert noise.asked == [(0, given, 3), (1, given + 3, 3)]
    assert (ours - slow(transformer, blocks=blocks, given=latents, context_timestep=40.0)).abs().max() < 5e-5


EULER = {"name": "multi_step", "num_inference_steps": 3, "solver": "euler", "guidance_scale": 1.0}
WINDOW = {"name": "rolling_window", "timesteps": [1000, 600, 300]}
ROLLING = {"policy": "rolling_forcing", "num_context_frames": 15, "num_sink_frames": 3}


@pytest.mark.parametrize("sampler", [STEPS, WINDOW])
def test_a_source_that_ends_ends_the_rollout(transformer, sampler):
    assert torch.equal(
        roll(transformer, num_frames=30, sampler=sampler), roll(transformer, num_frames=15, sampler=sampler)
    )


@pytest.mark.parametrize(
    ("sampler", "cache"),
    [
        ({"name": "multi_step", "num_inference_steps": 3, "solver": "euler", "guidance_scale": 1.0}, "full"),
        (WINDOW, ROLLING),
    ],
)
def test_guidance_between_equal_prompts_changes_nothing(transformer, sampler, cache):
    settings = {"sampler": sampler | {"guidance_scale": 4.0}, "cache": cache}
    plain = roll(transformer, sampler=sampler, cache=cache)
    same, other = (roll(transformer, negative_prompt_embeds=sign * embeds(), **settings) for sign in (1, -1))
    assert (plain - same).abs().max() < 1e-4
    assert (plain - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 11}, "use 12"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"frames_per_block": 0}, "frames_per_block=0"),
        ({"first_block_frames": 1, "num_frames": 12}, "first block 1"),
        ({"initial_latents": torch.zeros(1, 2, *SHAPE)}, "no whole number of blocks"),
        ({"initial_latents": torch.zeros(2, 3, *SHAPE)}, "initial_latents has shape"),
        ({"cache": sink(5, 3)}, "use 6 or more"),
        ({"frame_shape": (4, 5, 6)}, "not divisible by the patch"),
        ({"schedule": [(3, torch.zeros(1, 7, 16), "recache")]}, "does not support the prompt event 'recache'"),
        ({"schedule": [(3, torch.zeros(1, 7, 16), "recash")]}, "unknown prompt event"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_forward(transformer, settings, message):
    with pytest.raises(ValueError, match=message):
        roll(transformer, **settings)


def test_noise_of_a_wrong_shape_is_refused(transformer):
    class Short(RecordedNoise):
        def initial(self, block_index, start_frame, shape):
            return super().initial(block_index, start_frame, shape)[:, :2]

    with pytest.raises(ValueError, match=r"gave shape \(1, 2, 4, 4, 6\) where \(1, 3, 4, 4, 6\)"):
        roll(transformer, noise=Short())
