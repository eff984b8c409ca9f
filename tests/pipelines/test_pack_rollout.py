"""Pack in a rollout of the mini model: jobs through the VAE, trained weights, and a run that is continued."""

import pytest
import torch

from longtake.models import VaePixels
from longtake.pipelines import LatentRollout, LongVideoPipeline
from longtake.samplers import SeededNoise

PACK = {"policy": "pack", "num_sink_frames": 3, "num_recent_frames": 3, "num_selected_blocks": 2}
LR = PACK | {"compressor": "lr"}
TRAINED = PACK | {"compressor": "hr+lr", "compressor_weights": "mini"}


@pytest.fixture(scope="module")
def pipe():
    return LongVideoPipeline.from_pretrained("mini")


def rollout(pipe, cache, *, num_blocks=6, pixels=True):
    return LatentRollout(
        pipe.transformer,
        pipe.embed_text(["a red circle bouncing quickly over a navy striped background"]),
        num_frames=3 * num_blocks,
        frame_shape=(12, 8, 8),
        cache=cache,
        sampler={"name": "few_step", "timesteps": [1000, 500]},
        noise=SeededNoise([0]),
        pixels=VaePixels(pipe.vae) if pixels else None,
    )


def test_compressed_blocks_are_four_tokens(pipe):
    made = rollout(pipe, LR)
    latents = torch.cat([block.latents for block in made], dim=1)
    assert latents.isfinite().all() and 0.3 < latents.std() < 3
    made.branches.commit_pending()
    tokens = made.stats().tokens
    assert (tokens["sink"], tokens["recent"], tokens["mid"]) == (48, 48, 2 * 4)
    small = made.branches.caches[0].state.bank.buffer.read(0, 0, 4 * 4)
    assert small.keys.any(dim=-1).all(), "every place in use has been filled by its job"


def test_pixels_are_asked_for_beforehand(pipe):
    with pytest.raises(ValueError, match="VAE|pixels"):
        rollout(pipe, LR, pixels=False)


def test_compressors_differ_once_the_middle_is_read(pipe):
    """Blocks 0 and 1 read no compressed block, nor does block 2; from block 3 on each compressor is another."""
    videos = [[block.latents for block in rollout(pipe, cache, num_blocks=4)] for cache in (PACK, LR, TRAINED)]
    for other in videos[1:]:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(videos[0][:3], other[:3], strict=True))
        assert (videos[0][3] - other[3]).abs().max() > 1e-3
    assert (videos[1][3] - videos[2][3]).abs().max() > 1e-4


def test_a_saved_run_goes_on_alike(pipe):
    first = rollout(pipe, TRAINED)
    for _ in range(4):
        first.next_block()
    second = rollout(pipe, TRAINED)
    second.load_state_dict(*first.state_dict())
    for _ in range(2):
        assert torch.equal(first.next_block().latents, second.next_block().latents)
