"""The rollout against a slow version without a cache, and what its arguments mean."""

import importlib.util
from pathlib import Path

import pytest
import torch

from longtake.pipelines import LatentRollout, PromptSwitch, rollout_latents

_spec = importlib.util.spec_from_file_location("rollout", Path(__file__).parents[1] / "reference" / "rollout.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

SHAPE = (4, 4, 6)
STEPS = {"name": "few_step", "timesteps": [1000, 500], "flow_shift": 5.0}
SIGMAS = (1.0, 2.5 / 3)


class Noise:
    """Recorded noise: a pure function of the frame, for 15 frames."""

    shape = (15, *SHAPE)

    def __init__(self, batch=1):
        draws = torch.randn(2, batch, 15, *SHAPE, generator=torch.Generator().manual_seed(1))
        self.draws, self.asked = draws, []

    def initial(self, block_index, start_frame, shape):
        self.asked.append((block_index, start_frame, tuple(shape)))
        return self.draws[0, :, start_frame : start_frame + shape[1]]

    def renoise(self, block_index, start_frame, step_index, shape):
        return self.draws[1, :, start_frame : start_frame + shape[1]]


def embeds(batch=1):
    return torch.randn(batch, 7, 16, generator=torch.Generator().manual_seed(2))


def window(frames, sinks=0):
    """(block start, length) -> frames read before it."""

    def reads(start, length):
        room = frames - length - min(sinks, start)
        return [*range(min(sinks, start)), *range(max(min(sinks, start), start - room), start)]

    return reads


def everything(start, length):
    return range(start)


def sink(frames, sinks):
    return {
        "policy": "attention_sink",
        "num_context_frames": frames,
        "num_sink_frames": sinks,
        "positions": "absolute",
    }


def roll(transformer, batch=1, noise=None, **settings):
    settings = {"num_frames": 12, "frame_shape": SHAPE, "sampler": STEPS, "cache": "full"} | settings
    blocks = list(rollout_latents(transformer, embeds(batch), noise=noise or Noise(batch), **settings))
    return torch.cat([b.latents for b in blocks], 1)


def slow(transformer, batch=1, **settings):
    settings = {"blocks": [3] * 4, "sigmas": SIGMAS, "reads": everything} | settings
    return reference.rollout(transformer, embeds(batch), noise=Noise(batch), **settings)


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
    latents = torch.randn(1, given, *SHAPE, generator=torch.Generator().manual_seed(3))
    fast = {"initial_latents": latents, "first_block_frames": first, "num_frames": 6, "context_timestep": 40}
    blocks = [first or 3, *[3] * ((given - (first or 3)) // 3), 3, 3]
    noise = Noise()
    ours = roll(transformer, noise=noise, **fast)
    assert noise.asked == [(0, given, (1, 3, *SHAPE)), (1, given + 3, (1, 3, *SHAPE))]
    assert (ours - slow(transformer, blocks=blocks, given=latents, context_timestep=40.0)).abs().max() < 5e-5


def test_a_source_that_ends_ends_the_rollout(transformer):
    assert roll(transformer, num_frames=30).shape[1] == 15


@pytest.mark.parametrize("merge_commit", [True, False])
def test_a_prompt_switch_takes_effect_at_the_first_block_that_starts_there(transformer, merge_commit):
    other = 3 * embeds()
    plain = roll(transformer)
    rollout = LatentRollout(
        transformer,
        embeds(),
        num_frames=12,
        frame_shape=SHAPE,
        sampler=STEPS,
        noise=Noise(),
        merge_commit=merge_commit,
    )
    rollout.schedule.append(PromptSwitch(5, other))
    blocks = list(rollout)
    switched = torch.cat([b.latents for b in blocks], 1)
    assert [b.prompt_index for b in blocks] == [-1, -1, 0, 0]
    assert (switched[:, :6] - plain[:, :6]).abs().max() < 1e-5
    assert (switched[:, 6:9] - plain[:, 6:9]).abs().max() > 1e-3


def test_guidance_between_equal_prompts_changes_nothing(transformer):
    steps = {"name": "multi_step", "num_inference_steps": 3, "solver": "euler"}
    plain = roll(transformer, sampler=steps | {"guidance_scale": 1.0})
    same = roll(transformer, sampler=steps | {"guidance_scale": 4.0}, negative_prompt_embeds=embeds())
    other = roll(transformer, sampler=steps | {"guidance_scale": 4.0}, negative_prompt_embeds=-embeds())
    assert (plain - same).abs().max() < 1e-5
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
    class Short(Noise):
        def initial(self, block_index, start_frame, shape):
            return super().initial(block_index, start_frame, shape)[:, :2]

    with pytest.raises(ValueError, match=r"gave shape \(1, 2, 4, 4, 6\) where \(1, 3, 4, 4, 6\)"):
        roll(transformer, noise=Short())
