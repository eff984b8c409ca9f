"""A clip that is one block, as the preset of the bidirectional base model makes it."""

from dataclasses import replace

import pytest
import torch

from longtake.configs.families import load_family
from longtake.samplers import SeededNoise, make_sampler

PROMPT = "a red circle moving left over a navy plain background"


@pytest.fixture
def wan_pipe(tiny_pipe, tiny_family):
    """The tiny model run as ``wan`` is, in fewer steps."""
    family = load_family("wan")
    sampler = {**family.sampler, "num_inference_steps": 4}
    sizes = {"height": 32, "width": 32, "max_sequence_length": tiny_family.max_sequence_length}
    tiny_pipe.family = replace(family, sampler=sampler, **sizes)
    return tiny_pipe


def test_it_is_the_stock_transformers_own_sampling(wan_pipe):
    latents = wan_pipe(PROMPT, num_frames=81, seed=3, output_type="latent").frames
    assert latents.shape[2] == 21

    embeds = [wan_pipe.embed_text([PROMPT]), wan_pipe.embed_text([""], is_negative=True)]
    sampler = make_sampler(wan_pipe.family.sampler)

    def denoise(x, timestep):
        level = torch.tensor([timestep])
        cond, uncond = (
            wan_pipe.transformer(x.transpose(1, 2), timestep=level, encoder_hidden_states=e).sample for e in embeds
        )
        flow = uncond + sampler.guidance_scale * (cond - uncond)
        return x - timestep / 1000 * flow.transpose(1, 2)

    with torch.no_grad():
        noise = SeededNoise([3]).initial(0, 0, (1, 21, 4, 4, 4))
        expected = sampler.sample(denoise, noise, renoise=None, block_index=0).transpose(1, 2)
    assert (latents - expected).abs().max() < 1e-4
    blocks = wan_pipe(PROMPT, num_frames=81, seed=3, output_type="latent", frames_per_block=3).frames
    assert (blocks - expected).abs().max() > 0.01, "a model in blocks does not see what comes later"


def test_a_longer_video_is_refused(wan_pipe):
    with pytest.raises(ValueError, match="cannot hold a rollout of 42 frames"):
        wan_pipe.start(PROMPT, num_frames=85)
