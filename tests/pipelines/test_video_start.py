"""A video that goes on from an image, a clip or latents: equal to given latents, streamed, with a clock of its own."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rollouts import OTHER, PROMPT, SINK, joined, joined_frames

from longtake.models import VaePixels
from longtake.pipelines import rollout_latents
from longtake.pipelines.conditioning import Clip
from longtake.pipelines.run_video import _TakenLatents
from longtake.samplers import SeededNoise

DEEP = {"policy": "deep_forcing", "num_context_frames": 12, "num_sink_frames": 3, "num_budget_frames": 9}
DEEP |= {"num_recent_frames": 3}
ROLLING = {"name": "rolling_window", "timesteps": [1000, 600, 300]}


def clip(num_frames, seed=0, size=32):
    """Frames that change from one to the next."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, size, size, 3), dtype=np.uint8)


def encoded(pipe, frames):
    """(batch, latent frames, channels, height, width) of whole clips by the VAE's own encode."""
    video = torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        return VaePixels(pipe.vae).normalise(pipe.vae.encode(video).latent_dist.mode())


def start(pipe, prompt=PROMPT, **settings):
    return pipe.start(prompt, **{"num_frames": 24, "cache": SINK, "seed": 3} | settings)


def chunks(pipe, prompt=PROMPT, **settings):
    return list(start(pipe, prompt, **settings))


def begun(found):
    """Chunks of the start."""
    return [chunk for chunk in found if chunk.index < 0]


def made(found):
    """Frames of the chunks that were made."""
    return joined_frames(chunk for chunk in found if chunk.index >= 0)


@pytest.mark.parametrize(
    ("cache", "sampler"),
    [(SINK, None), ("full", None), (DEEP, None), ({"policy": "rolling_forcing", "num_context_frames": 15}, ROLLING)],
)
def test_a_clip_equals_its_latents_given_to_the_rollout(tiny_pipe, cache, sampler):
    sampler = sampler or tiny_pipe.family.sampler
    frames = clip(34)
    latents = encoded(tiny_pipe, [frames[1:]])
    assert latents.shape[1] == 9
    ours = chunks(tiny_pipe, video=frames, cache=cache, sampler=sampler)
    assert (joined(begun(ours)) - latents).abs().max() == 0
    settings = {"num_frames": 6, "frame_shape": (4, 4, 4), "cache": cache, "sampler": sampler}
    settings |= {"noise": SeededNoise([3]), "initial_latents": latents, "pixels": VaePixels(tiny_pipe.vae)}
    theirs = list(rollout_latents(tiny_pipe.transformer, tiny_pipe.embed_text([PROMPT]), **settings))
    assert [block.start_frame for block in theirs] == [c.start_frame for c in ours if c.index >= 0] == [9, 12]
    assert torch.equal(joined(ours)[:, 9:], joined(theirs))


def test_the_start_comes_out_decoded_and_changes_nothing_when_left_out(tiny_pipe):
    frames = clip(33)
    whole = chunks(tiny_pipe, video=frames)
    assert [c.index for c in whole] == [-3, -2, -1, 0, 1]
    assert [c.frames.shape[1] for c in whole] == [9, 12, 12, 12, 12]
    assert [c.is_last for c in whole] == [False] * 4 + [True]
    with torch.no_grad():
        latents = VaePixels(tiny_pipe.vae).denormalise(joined(whole))
        decoded = tiny_pipe.vae.decode(latents).sample.transpose(1, 2)
    assert (joined_frames(whole) - (decoded / 2 + 0.5)).abs().max() < 1e-6
    alone = chunks(tiny_pipe, video=frames, include_start=False)
    assert [c.index for c in alone] == [0, 1]
    assert torch.equal(joined_frames(alone), made(whole))
    called = tiny_pipe(PROMPT, video=frames, num_frames=24, cache=SINK, seed=3, output_type="pt").frames
    assert torch.equal(called, joined_frames(whole))
    given = joined(begun(whole)).transpose(1, 2)
    assert torch.equal(made(chunks(tiny_pipe, video_latents=given)), made(whole))


def test_a_clip_that_never_reached_the_cache_or_another_clip_gives_another_video(tiny_pipe):
    right = joined(chunks(tiny_pipe, video=clip(33)))[:, 9:]
    session = start(tiny_pipe, video=clip(33))
    session.rollout._next_given_frame = session.rollout.num_given_frames
    other = joined(chunks(tiny_pipe, video=clip(33, seed=1)))[:, 9:]
    assert (joined(session) - right).abs().max() > 1e-2 and (other - right).abs().max() > 1e-2


def test_noise_and_lengths_count_from_the_end_of_the_clip(tiny_pipe):
    asked = []

    class Noise(SeededNoise):
        def initial(self, block_index, start_frame, shape):
            asked.append((block_index, start_frame))
            return super().initial(block_index, start_frame, shape)

    session = start(tiny_pipe, num_frames=None, seconds=2, video=clip(21))
    session.rollout.noise = Noise([3])
    assert (session.num_frames, session.num_blocks, session.num_start_frames) == (32, 3, 21)
    assert made(list(session)).shape[1] == 32
    assert asked == [(0, 6), (1, 9), (2, 12)]
    noise = torch.cat([SeededNoise([3]).initial(i, 0, (1, 3, 4, 4, 4)) for i in range(2)], 1).transpose(1, 2)
    ours = chunks(tiny_pipe, video=clip(21))
    assert torch.equal(made(ours), made(chunks(tiny_pipe, video=clip(21), latents=noise)))


def test_prompt_changes_count_from_the_end_of_the_clip(tiny_pipe):
    """Blocks start at frames 0, 12, 24 of 16 a second, whatever comes before."""
    fps = tiny_pipe.family.fps
    settings = {"num_frames": 36, "video": clip(21)}
    plain = made(chunks(tiny_pipe, **settings))
    for at, block in ((0, 0), (12 / fps, 1), (12.5 / fps, 2)):
        session = start(tiny_pipe, schedule=[(at, OTHER)], **settings)
        assert session.prompt_changes[0]["block"] == block
        assert session.is_due(at) == (block == 0)
        changed = made(list(session))
        assert torch.equal(changed[:, : 12 * block], plain[:, : 12 * block])
        assert not torch.equal(changed[:, 12 * block :], plain[:, 12 * block :])
    session = start(tiny_pipe, **settings)
    list(session.observe())
    session.next_block()
    with pytest.raises(ValueError, match="too late or out of order: 0.25 s is the earliest"):
        session.change_prompt(OTHER, at=0.0)


@pytest.mark.parametrize("stop", [0, 1])
def test_a_saved_video_goes_on_without_its_clip(tiny_pipe, stop):
    """Given blocks are committed at timestep 0, whatever the family's context timestep, after a resume too."""
    tiny_pipe.family = replace(tiny_pipe.family, context_timestep=100.0)
    session, whole = (start(tiny_pipe, num_frames=36, video=clip(33)) for _ in range(2))
    resumed, empty = (start(tiny_pipe, num_frames=36, video_latents=_TakenLatents(9)) for _ in range(2))
    seen, whole = list(session.observe()), list(whole)
    assert torch.equal(joined_frames(seen), joined_frames(begun(whole))) and not list(session.observe())
    for _ in range(stop):
        session.next_block()
    resumed.load_state_dict(*session.state_dict())
    rest = list(resumed)
    assert [c.index for c in rest] == [0, 1, 2][stop:]
    assert torch.equal(joined_frames(rest), made(whole)[:, 12 * stop :])
    with pytest.raises(ValueError, match="in none of its saved states"):
        empty.next_block()


def test_a_state_in_the_middle_of_the_start_is_refused(tiny_pipe):
    session, again = (start(tiny_pipe, video=clip(33)) for _ in range(2))
    before = session.state_dict()
    next(session.observe())
    with pytest.raises(ValueError, match="3 of 9 given latents are taken in"):
        session.state_dict()
    again.load_state_dict(*before)
    assert torch.equal(made(again), made(session))


def test_long_clips_take_no_more_memory_than_short_ones(tiny_pipe):
    """Frames exist from when they are read until their block is encoded; 24 blocks go through a window of three."""
    window = {"policy": "sliding_window", "num_context_frames": 9}
    alive: set[int] = set()
    largest = 0

    def read():
        nonlocal largest
        for index in range(9 + 12 * 23):
            frame = torch.full((3, 32, 32), index / 512)
            alive.add(index)
            weakref.finalize(frame, alive.discard, index)
            largest = max(largest, len(alive))
            yield frame

    source = Clip(num_frames=9 + 12 * 23, height=32, width=32, read=read)
    session = start(tiny_pipe, num_frames=12, cache=window, video=source)
    assert largest == 0, "nothing is read before it is taken in"
    sizes = [(chunk.stats.num_tokens, chunk.num_cache_bytes) for chunk in session.observe()]
    assert len(sizes) == 24 and largest <= 13
    assert sizes[-1] == sizes[5] and sizes[-1][0] <= 9 * 4
    assert session.next_block().index == 0


def test_clips_of_a_batch_go_with_their_prompts(tiny_pipe):
    frames = [clip(33), clip(33, seed=1)]
    both = made(chunks(tiny_pipe, [PROMPT, OTHER], video=frames, seed=[3, 5]))
    for index, (prompt, seed) in enumerate(((PROMPT, 3), (OTHER, 5))):
        single = made(chunks(tiny_pipe, prompt, video=frames[index], seed=seed))
        assert (both[index] - single[0]).abs().max() < 1e-4
    shared = made(chunks(tiny_pipe, [PROMPT, OTHER], video=frames[1], seed=[3, 5]))
    assert (shared[1] - both[1]).abs().max() < 1e-4


@pytest.mark.parametrize(("block", "starts"), [(1, [0, 1, 2]), (3, [0, 1, 4])])
def test_models_that_start_from_an_image_do(tiny_pipe, block, starts):
    pipe = tiny_pipe
    pipe.family = replace(pipe.family, frames_per_block=block, first_block_frames=1, starts=("image", "video"))
    cache = SINK | {"num_context_frames": 6, "num_sink_frames": 1}
    image = Image.fromarray(clip(1, size=40)[0])
    found = chunks(pipe, image=image, num_frames=8 * block, cache=cache)
    assert [c.start_frame for c in found] == starts and [c.index for c in found] == [-1, 0, 1]
    assert [c.frames.shape[1] for c in found] == [1, 4 * block, 4 * block]
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS))
    assert (joined(begun(found)) - encoded(pipe, [pixels[None]])).abs().max() < 1e-6
    other = chunks(pipe, image=clip(1, seed=2)[0], num_frames=8 * block, cache=cache)
    assert (made(other) - made(found)).abs().max() > 1e-3
    # A clip's first latent frame is a block of its own.
    video = chunks(pipe, video=clip(1 + 4 * 3), num_frames=8 * block, cache=cache)
    assert [c.latents.shape[1] for c in video] == ([1] * 6 if block == 1 else [1, 3, 3, 3])


def test_an_image_may_be_repeated(tiny_pipe):
    repeated = chunks(tiny_pipe, video=[Image.fromarray(clip(1)[0])] * 9)
    assert [c.index for c in repeated] == [-1, 0, 1]


IMAGE_MODEL = {"first_block_frames": 1, "starts": ("video",)}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ({}, {"image": clip(1)[0]}, r"first block takes 3: give a video of 9 frames or more \(0.56 s\)"),
        (IMAGE_MODEL | {"starts": ()}, {"video": clip(33)}, "does not start from a video; it starts from: text"),
        (IMAGE_MODEL, {"image": clip(1)[0]}, "does not start from a image; it starts from: text, video"),
        ({}, {"video": clip(33), "image": clip(1)[0]}, "image and video are given"),
        ({}, {"video": clip(8)}, "the first block takes 9"),
        ({}, {"video": "none.mp4"}, "there is no video none.mp4"),
        ({}, {"video": np.zeros((33, 4, 640, 3), np.uint8)}, "crop it yourself"),
        ({}, {"video_latents": torch.zeros(1, 4, 8, 4, 4)}, "8 frames, which is no whole number of blocks"),
        ({}, {"video_latents": torch.zeros(1, 9, 4, 4, 4)}, r"expected \(1, 4, frames, 4, 4\)"),
        ({}, {"video": clip(33), "cache": {"policy": "full", "num_context_frames": 12}}, "rollout of 15 frames"),
        ({}, {"video": [clip(33), clip(33)]}, "2 videos for 1 samples"),
        ({}, {"prompt": [PROMPT, OTHER], "video": [clip(33), clip(21)]}, r"the videos fill \[6, 9\] latent frames"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_any_work(tiny_pipe, family, settings, message, monkeypatch):
    monkeypatch.setattr(tiny_pipe.transformer, "forward", lambda *a, **k: pytest.fail("a forward was made"))
    tiny_pipe.family = replace(tiny_pipe.family, **family)
    with pytest.raises(ValueError, match=message):
        start(tiny_pipe, **settings)
