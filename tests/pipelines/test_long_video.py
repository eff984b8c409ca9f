"""The pipeline as a diffusers user meets it."""

import numpy as np
import pytest
import torch
from rollouts import OTHER, PROMPT, SINK, joined_frames, make_video

SETTINGS = {"num_frames": 45, "cache": SINK, "seed": 3}


def run(pipe, prompt=PROMPT, **settings):
    return make_video(pipe, prompt, **SETTINGS | settings)


def test_output_types_and_lengths(tiny_pipe):
    video = tiny_pipe(PROMPT, num_frames=33, cache=SINK, seed=3).frames
    assert video.shape == (1, 33, 32, 32, 3) and video.dtype == np.float32
    assert video.min() >= 0.0 and video.max() <= 1.0 and video.std() > 0.01
    assert run(tiny_pipe, num_frames=33).shape == (1, 33, 3, 32, 32)
    assert run(tiny_pipe, num_frames=33, output_type="latent").shape == (1, 4, 9, 4, 4)
    images = run(tiny_pipe, num_frames=33, output_type="pil")
    assert len(images) == 1 and len(images[0]) == 33 and images[0][0].size == (32, 32)
    assert isinstance(tiny_pipe(PROMPT, num_frames=9, return_dict=False, seed=0), tuple)


def test_seconds_round_up_to_whole_latent_frames(tiny_pipe):
    lengths = {961: {"seconds": 60}, 81: {"num_frames": 80}}
    assert all(tiny_pipe.num_pixel_frames(**length) == frames for frames, length in lengths.items())
    assert tiny_pipe.num_pixel_frames() == 81


def test_stream_equals_call_and_a_second_video_equals_the_first(tiny_pipe):
    chunks = list(tiny_pipe.stream(PROMPT, **SETTINGS))
    assert [c.index for c in chunks] == [0, 1, 2, 3] and [c.is_last for c in chunks] == [False] * 3 + [True]
    assert [c.frames.shape[1] for c in chunks] == [9, 12, 12, 12]
    video = joined_frames(chunks)
    assert torch.equal(video, run(tiny_pipe))
    assert torch.equal(video, run(tiny_pipe))
    assert not torch.equal(video, run(tiny_pipe, seed=4))


def test_interleaved_videos_do_not_touch_each_other(tiny_pipe):
    alone = [list(tiny_pipe.stream(p, num_frames=33, cache=SINK, seed=3)) for p in (PROMPT, OTHER)]
    pair = zip(*(tiny_pipe.stream(p, num_frames=33, cache=SINK, seed=3) for p in (PROMPT, OTHER)), strict=True)
    for index, (first, second) in enumerate(pair):
        assert torch.equal(first.frames, alone[0][index].frames)
        assert torch.equal(second.frames, alone[1][index].frames)


def test_a_batch_equals_single_runs(tiny_pipe):
    both = run(tiny_pipe, [PROMPT, OTHER], seed=[3, 5])
    assert (both[:1] - run(tiny_pipe, PROMPT, seed=3)).abs().max() <= 1e-4
    assert (both[1:] - run(tiny_pipe, OTHER, seed=5)).abs().max() <= 1e-4
    assert (both[1:] - run(tiny_pipe, OTHER, seed=3)).abs().max() > 1e-2


def test_the_transformer_is_stock_between_blocks(tiny_pipe):
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.zeros(1, 16, 32)}
    with torch.no_grad():
        before = tiny_pipe.transformer(x, **arguments).sample
        stream = tiny_pipe.stream(PROMPT, num_frames=45, cache=SINK)
        next(stream)
        assert torch.equal(tiny_pipe.transformer(x, **arguments).sample, before)
        next(stream)
        stream.close()
        assert torch.equal(tiny_pipe.transformer(x, **arguments).sample, before)


@pytest.mark.parametrize(
    ("sampler", "merge_commit"), [(None, True), ({"name": "multi_step", "num_inference_steps": 3}, False)]
)
def test_save_and_continue_is_bit_identical(tiny_pipe, sampler, merge_commit):
    def start():
        session = tiny_pipe.start(PROMPT, num_frames=69, cache=SINK, seed=3, sampler=sampler)
        session.rollout.merge_commit = merge_commit
        return session

    session, resumed = start(), start()
    chunks = []
    for chunk in session:
        chunks.append(chunk)
        if chunk.index == 2:
            session.change_prompt(OTHER)
        if chunk.index == 3:
            tensors, numbers = session.state_dict()
            tensors = {key: value.clone() for key, value in tensors.items()}
    resumed.load_state_dict(tensors, numbers)
    rest = list(resumed)
    assert [c.index for c in rest] == [4, 5] and rest[-1].prompt == (OTHER,)
    assert torch.equal(joined_frames(rest), joined_frames(chunks[4:]))


def test_merging_the_commit_changes_nothing(tiny_pipe):
    videos = []
    for merge_commit in (True, False):
        session = tiny_pipe.start(PROMPT, num_frames=69, cache=SINK, seed=3)
        session.rollout.merge_commit = merge_commit
        videos.append(torch.cat([c.latents for c in session], 1))
    assert (videos[0] - videos[1]).abs().max() < 2e-5


def test_prompt_change_takes_effect_and_seed_generator_callback(tiny_pipe):
    session = tiny_pipe.start(PROMPT, **SETTINGS)
    plain = run(tiny_pipe)
    first = session.next_block()
    assert session.change_prompt(OTHER) == 1
    assert torch.equal(first.frames, plain[:, :9])
    assert not torch.equal(session.next_block().frames, plain[:, 9:21])

    generator = torch.Generator().manual_seed(7)
    a, b = (run(tiny_pipe, generator=generator, seed=None, num_frames=9) for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(a, run(tiny_pipe, generator=torch.Generator().manual_seed(7), seed=None, num_frames=9))

    seen = []

    def callback(pipe, step, timestep, values):
        seen.append((step, timestep, tuple(values["latents"].shape)))
        return {"latents": torch.zeros_like(values["latents"])}

    zeroed = run(tiny_pipe, num_frames=9, output_type="latent", callback_on_step_end=callback)
    assert seen == [(0, 1000.0, (1, 3, 4, 4, 4)), (1, pytest.approx(833.333), (1, 3, 4, 4, 4))]
    assert not zeroed.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "sliding_windw"}, "Did you mean 'sliding_window'"),
        ({"cache": SINK | {"num_sink_frame": 2}}, "Did you mean 'num_sink_frames'"),
        ({"cache": SINK | {"num_context_frames": 5}}, "use 6 or more"),
        ({"cache": SINK | {"num_context_frames": "many"}}, "whole number"),
        ({"cache": {"policy": "full", "num_context_frames": 6}}, "rollout of 12 frames"),
        ({"num_frames": None, "seconds": 0}, "seconds=0"),
        ({"num_frames": None, "seconds": float("nan")}, "seconds=nan"),
        ({"num_frames": 9, "seconds": 2}, "one of the two"),
        ({"num_frames": -1}, "num_frames=-1"),
        ({"height": 40}, "height=40 is not divisible by 16: use 32"),
        ({"width": 8}, "width=8 is not divisible by 16: use 16"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "red " * 10_000}, "shorten it"),
        ({"prompt": []}, "empty"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"sampler": "few_stp"}, "Did you mean 'few_step'"),
        ({"sampler": {"name": "few_step", "timesteps": [1000, 0]}}, "trailing 0"),
        ({"guidance_scale": 3.0}, "guidance_scale"),
        ({"output_type": "gif"}, "output_type='gif'"),
    ],
)
def test_bad_input_is_named_before_any_work(tiny_pipe, settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(tiny_pipe, **settings)


def test_a_schedule_takes_effect_at_the_first_block_that_starts_in_time(tiny_pipe):
    """Blocks start at pixel frames 0, 9, 21 and 33 of 16 a second."""
    plain = run(tiny_pipe)
    fps = tiny_pipe.family.fps
    for at, frame in ((9 / fps, 9), (9.5 / fps, 21), (1.2, 21)):
        changed = run(tiny_pipe, schedule=[(at, OTHER)])
        assert torch.equal(changed[:, :frame], plain[:, :frame])
        assert (changed[:, frame:] - plain[:, frame:]).abs().amax((0, 2, 3, 4)).min() > 1e-5
    assert torch.equal(run(tiny_pipe, schedule=[(0, OTHER)]), run(tiny_pipe, OTHER))


def test_a_session_says_which_prompts_it_shows_from_which_block(tiny_pipe):
    session = tiny_pipe.start(PROMPT, num_frames=45, cache=SINK, schedule=[(0.6, OTHER, "keep"), (2.0, PROMPT)])
    assert session.prompt_changes == [
        {"block": 2, "start_frame": 6, "prompt": OTHER, "event": "keep"},
        {"block": 3, "start_frame": 9, "prompt": PROMPT, "event": "keep"},
    ]
    assert [chunk.prompt for chunk in session] == [(PROMPT,), (PROMPT,), (OTHER,), (PROMPT,)]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([(1.0, OTHER, "cut")], "does not support the prompt event 'cut'"),
        ([(1.0, OTHER, "cat")], "unknown prompt event 'cat'"),
        ([(1.0, OTHER), (0.5, PROMPT)], "out of order: 1.06"),
        ([(-1.0, OTHER)], "a time of 0 or more"),
        ([(1.0, "")], "the prompt is empty"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_before_any_work(tiny_pipe, schedule, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipe.start(PROMPT, num_frames=45, cache={"policy": "full"}, schedule=schedule)


ROLLING = {
    "num_frames": 57,
    "cache": {"policy": "rolling_forcing", "num_context_frames": 15},
    "sampler": {"name": "rolling_window", "timesteps": [1000, 600, 300]},
    "seed": 3,
}


def test_blocks_denoised_together_come_out_one_by_one(tiny_pipe):
    chunks = list(tiny_pipe.stream(PROMPT, **ROLLING))
    assert [c.index for c in chunks] == [0, 1, 2, 3, 4] and [c.is_last for c in chunks] == [False] * 4 + [True]
    assert joined_frames(chunks).shape[1] == 57
    first, second = (tiny_pipe.start(PROMPT, **ROLLING) for _ in range(2))
    parts = [first.next_block() for _ in range(3)]
    second.load_state_dict(*first.state_dict())
    assert torch.equal(joined_frames(chunks), joined_frames([*parts, *second]))


def test_a_change_is_due_before_its_block_enters_the_window(tiny_pipe):
    """Blocks start at pixel frames 0, 9, 21, 33 and 45; the first chunk needs three of them."""
    session = tiny_pipe.start(PROMPT, **ROLLING)
    assert session.num_ahead == 2
    fps = session.fps
    assert [session.is_due(frame / fps) for frame in (9, 21, 22)] == [True, True, False]
    session.next_block()
    assert [session.is_due(frame / fps) for frame in (33, 34)] == [True, False]
    assert session.change_prompt(OTHER, at=25 / fps) == 3
    with pytest.raises(ValueError, match="too late"):
        session.change_prompt(OTHER, at=20 / fps)
    assert [chunk.prompt for chunk in session] == [(PROMPT,), (PROMPT,), (OTHER,), (OTHER,)]
