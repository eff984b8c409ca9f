"""Numerics and the fast VAE as properties of a pipeline."""

import pytest
import torch
from safetensors.torch import save_file

from longtake.models import StreamingTinyDecoder, TinyVae
from longtake.models.tiny_vae import TinyLayout
from longtake.pipelines import LongVideoPipeline

PROMPT = "a red circle moving left over a navy plain background"
SETTINGS = {"num_frames": 33, "cache": "attention_sink", "seed": 3}
LAYOUT = {"latent_channels": 4, "widths": (8, 6, 6, 4)}


def write(path, seed=0, **layout):
    torch.manual_seed(seed)
    vae = TinyVae(TinyLayout(**LAYOUT | layout))
    vae.decoder["22"].bias.data.fill_(0.5)
    save_file(vae.state_dict(), path)
    return path


def test_fast_vae_makes_the_pixels_and_nothing_else(tiny_pipe, tmp_path):
    file = write(tmp_path / "tiny.safetensors")
    slow = list(tiny_pipe.stream(PROMPT, **SETTINGS))
    tiny_pipe.use_fast_vae(file)
    fast = list(tiny_pipe.stream(PROMPT, **SETTINGS))
    assert [chunk.frames.shape for chunk in fast] == [chunk.frames.shape for chunk in slow]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(fast, slow, strict=True))
    latents = torch.cat([chunk.latents for chunk in fast], dim=1).transpose(1, 2)
    whole = StreamingTinyDecoder(tiny_pipe.tiny_vae).decode(latents).mul(0.5).add(0.5).transpose(1, 2)
    assert torch.equal(torch.cat([chunk.frames for chunk in fast], dim=1), whole)
    tiny_pipe.use_fast_vae(None)
    again = list(tiny_pipe.stream(PROMPT, **SETTINGS))
    assert torch.equal(again[0].frames, slow[0].frames)


def test_a_saved_take_goes_on_with_the_fast_vae(tiny_pipe, tmp_path):
    tiny_pipe.use_fast_vae(write(tmp_path / "tiny.safetensors"))
    whole = tiny_pipe.start(PROMPT, **SETTINGS)
    whole.next_block()
    tensors, numbers = whole.state_dict()
    continued = tiny_pipe.start(PROMPT, **SETTINGS)
    continued.load_state_dict(tensors, numbers)
    for ours, theirs in zip(continued, whole, strict=True):
        assert torch.equal(ours.frames, theirs.frames)
    tiny_pipe.use_fast_vae(None)
    with pytest.raises(ValueError, match="lacks 'slots'"):
        tiny_pipe.start(PROMPT, **SETTINGS).load_state_dict(tensors, numbers)


def test_policies_that_pool_pixels_keep_the_vae(tiny_pipe, tmp_path):
    settings = {"num_frames": 57, "cache": {"policy": "pack", "compressor": "lr"}, "height": 64, "width": 64}
    slow = list(tiny_pipe.stream(PROMPT, **settings))
    tiny_pipe.use_fast_vae(write(tmp_path / "tiny.safetensors"))
    fast = list(tiny_pipe.stream(PROMPT, **settings))
    assert torch.equal(fast[-1].latents, slow[-1].latents)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"latent_channels": 16}, "16 channels in a latent, this model has 4"),
        ({"growths": (1, 1, 2)}, "2 pixel frames to a latent frame, this model has 4"),
        ({"patch_size": 2}, "16 pixels to a latent position's side, this model has 8"),
    ],
)
def test_a_decoder_of_another_vae_is_refused(tiny_pipe, tmp_path, layout, words):
    with pytest.raises(ValueError, match=words):
        tiny_pipe.use_fast_vae(write(tmp_path / "tiny.safetensors", **layout))
    assert tiny_pipe.tiny_vae is None


def test_loading_takes_both_options(tiny_folder, tiny_family, tmp_path):
    file = write(tmp_path / "tiny.safetensors")
    options = {"family": tiny_family, "numerics": "upstream", "fast_vae": file}
    pipe = LongVideoPipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16, **options)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.tiny_vae.decoder["1"].weight.dtype == torch.bfloat16
    chunks = list(pipe.stream(PROMPT, **SETTINGS))
    assert all(chunk.latents.dtype == torch.bfloat16 and chunk.frames.dtype == torch.float32 for chunk in chunks)
    pipe.numerics = "native"
    native = list(pipe.stream(PROMPT, **SETTINGS))
    difference = (native[-1].latents - chunks[-1].latents.float()).abs()
    assert 1e-4 < difference.mean() < 0.1
    with pytest.raises(ValueError, match="native, upstream"):
        LongVideoPipeline.from_pretrained(tiny_folder, numerics="exact")
    with pytest.raises(ValueError, match="does not exist"):
        LongVideoPipeline.from_pretrained(tiny_folder, fast_vae=tmp_path / "none.pth")


def test_save_pretrained_writes_a_stock_folder(tiny_pipe, tmp_path):
    tiny_pipe.use_fast_vae(write(tmp_path / "tiny.safetensors"))
    tiny_pipe.save_pretrained(tmp_path / "saved")
    assert LongVideoPipeline.from_pretrained(tmp_path / "saved").tiny_vae is None
