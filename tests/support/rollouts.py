"""Rollouts of the tiny transformer: recorded noise, prompts, and saved states that go on."""

import torch
from safetensors.torch import load, save

SHAPE = (4, 4, 6)  # channels, rows and columns of a latent frame


class RecordedNoise:
    """Noise as a function of frame and step, which ends after ``num_frames``; frame 0 is the recorded ``start``."""

    def __init__(self, num_frames=24, *, batch=1, start=0):
        generator = torch.Generator().manual_seed(1)
        self.draws = torch.randn(4, batch, num_frames, *SHAPE, generator=generator)[:, :, start:]
        self.shape, self.asked = (num_frames, *SHAPE), []

    def initial(self, block_index, start_frame, shape):
        self.asked.append((block_index, start_frame, shape[1]))
        return self.draws[-1, :, start_frame : start_frame + shape[1]]

    def renoise(self, block_index, start_frame, step_index, shape):
        return self.draws[step_index, :, start_frame : start_frame + shape[1]]


def embeds(batch=1, *, seed=2):
    return torch.randn(batch, 7, 16, generator=torch.Generator().manual_seed(seed))


def given_latents(num_frames):
    return torch.randn(1, num_frames, *SHAPE, generator=torch.Generator().manual_seed(3))


def joined(blocks):
    return torch.cat([block.latents for block in blocks], 1)


def assert_resumes_everywhere(make, whole):
    """A state that was saved as a file after any number of blocks goes on to the rest of ``whole``, bit for bit."""
    for stop in range(len(whole) + 1):
        first, second = make(), make()
        for _ in range(stop):
            first.next_block()
        tensors, numbers = first.state_dict()
        second.load_state_dict(load(save(tensors)), numbers)
        rest = list(second)
        assert [block.prompt_index for block in rest] == [block.prompt_index for block in whole[stop:]]
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, whole[stop:], strict=True))


# Videos of the tiny pipeline.
PROMPT = "a red circle moving left over a navy plain background"
OTHER = "a blue square moving right"
SINK = {"policy": "attention_sink", "num_context_frames": 9, "num_sink_frames": 3}


def make_video(pipe, prompt=PROMPT, **settings):
    """Frames of one call, two seconds unless told otherwise."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, **{"num_frames": 33, "cache": SINK, "seed": 3, "output_type": "pt"} | settings).frames


def joined_frames(chunks):
    return torch.cat([chunk.frames for chunk in chunks], 1)
