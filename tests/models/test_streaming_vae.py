"""The streamed VAE equals the offline one bit for bit, in any chunking, and continues from a saved state."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm, WanUpsample
from safetensors.torch import load, save

from longtake.models.streaming_vae import StreamingDecoder, StreamingEncoder, use_fast_kernels

COMMON = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
PATCHED = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
CONFIGS = {
    "wan21": {**COMMON, "dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]},
    "patched": {**COMMON, **PATCHED, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True]},
    "residual": {
        **COMMON,
        **PATCHED,
        "dim_mult": [1, 2, 2, 2],
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "scale_factor_spatial": 16,
    },
}
DECODE_SIZES = [[1] * 8, [3, 3, 2], [4, 4], [2, 1, 5], [8]]
ENCODE_SIZES = [[29], [9, 12, 8], [1, *[4] * 7], [5, 7, 3, 2, 12], [2, 2, 25]]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def vae(request):
    torch.manual_seed(0)
    return AutoencoderKLWan(**CONFIGS[request.param]).eval()


def split(tensor, sizes):
    return tensor.split(sizes, dim=2)


def through_file(state):
    """Send a state through the forms it takes on disk: safetensors bytes and JSON."""
    tensors, numbers = state
    return load(save(tensors)), json.loads(json.dumps(numbers))


@pytest.mark.parametrize("batch", [1, 2])
def test_streamed_decode_equals_offline_decode(vae, batch):
    latents = torch.randn(batch, 4, 8, 4, 6, generator=torch.Generator().manual_seed(1))
    offline = vae.decode(latents, return_dict=False)[0].detach()
    for sizes in DECODE_SIZES:
        decoder = StreamingDecoder(vae)
        parts = [decoder.decode(part) for part in split(latents, sizes)]
        assert parts[0].shape[2] == 1 + 4 * (sizes[0] - 1)
        assert all(part.shape[2] == 4 * size for part, size in zip(parts[1:], sizes[1:], strict=True))
        assert (torch.cat(parts, dim=2) - offline).abs().max() == 0, sizes


@pytest.mark.parametrize("batch", [1, 2])
def test_streamed_encode_equals_offline_encode(vae, batch):
    # 4x4 latent positions or more: below that the matrix library rounds short and long inputs differently.
    size = 4 * vae.spatial_compression_ratio
    frames = torch.rand(batch, 3, 29, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    offline = vae.encode(frames).latent_dist.mode().detach()
    for sizes in ENCODE_SIZES:
        encoder = StreamingEncoder(vae)
        parts = [encoder.encode(part) for part in split(frames, sizes)]
        assert (torch.cat(parts, dim=2) - offline).abs().max() == 0, sizes


def test_frames_short_of_a_latent_frame_wait(vae):
    frames = torch.zeros(1, 3, 3, 32, 32)
    encoder = StreamingEncoder(vae)
    assert encoder.encode(frames).shape[2] == 1
    assert encoder.encode(frames[:, :, :1]).shape[2] == 0
    assert encoder.encode(frames[:, :, :1]).shape[2] == 1


@pytest.mark.parametrize("stop", [0, 1, 2, 5])
def test_saved_decoder_continues_bit_identically(vae, stop):
    latents = torch.randn(2, 4, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    whole = StreamingDecoder(vae)
    first = whole.decode(latents[:, :, :stop]) if stop else None
    continued = StreamingDecoder(vae)
    continued.load_state_dict(*through_file(whole.state_dict()))
    expected = whole.decode(latents[:, :, stop:])
    assert torch.equal(continued.decode(latents[:, :, stop:]), expected)
    if first is not None:
        fresh = StreamingDecoder(vae).decode(latents[:, :, stop:])
        assert fresh.shape != expected.shape, "a decoder without the state must not pass for a continued one"


def test_saved_encoder_continues_bit_identically(vae):
    frames = torch.rand(1, 3, 21, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    whole = StreamingEncoder(vae)
    whole.encode(frames[:, :, :11])
    continued = StreamingEncoder(vae)
    continued.load_state_dict(*through_file(whole.state_dict()))
    assert torch.equal(continued.encode(frames[:, :, 11:]), whole.encode(frames[:, :, 11:]))


def test_two_streams_share_one_vae(vae):
    latents = torch.randn(2, 1, 4, 6, 4, 4, generator=torch.Generator().manual_seed(5))
    alone = [vae.decode(one, return_dict=False)[0] for one in latents]
    streams = [StreamingDecoder(vae), StreamingDecoder(vae)]
    parts = [[], []]
    for start in (0, 3):
        for stream, one, out in zip(streams, latents, parts, strict=True):
            out.append(stream.decode(one[:, :, start : start + 3]))
    for out, expected in zip(parts, alone, strict=True):
        assert torch.equal(torch.cat(out, dim=2), expected)


def test_state_does_not_grow(vae):
    decoder = StreamingDecoder(vae)
    sizes = []
    for _ in range(6):
        decoder.decode(torch.zeros(1, 4, 2, 4, 4))
        tensors, _ = decoder.state_dict()
        sizes.append(sum(tensor.numel() for tensor in tensors.values()))
    assert len(set(sizes[1:])) == 1


def test_bad_input_is_refused(vae):
    decoder = StreamingDecoder(vae)
    with pytest.raises(ValueError, match="shape"):
        decoder.decode(torch.zeros(1, 4, 0, 4, 4))
    with pytest.raises(ValueError, match="shape"):
        decoder.decode(torch.zeros(4, 2, 4, 4))
    with pytest.raises(ValueError, match="slots"):
        decoder.load_state_dict({}, {"num_frames": 1, "slots": ["empty"]})
    with pytest.raises(ValueError, match="lacks"):
        decoder.load_state_dict({}, {"num_frames": 1})
    tensors, numbers = decoder.state_dict()
    with pytest.raises(ValueError, match="known"):
        decoder.load_state_dict(tensors, {**numbers, "slots": ["what", *numbers["slots"][1:]]})
    vae.enable_tiling()
    try:
        with pytest.raises(ValueError, match="disable_tiling"):
            decoder.decode(torch.zeros(1, 4, 1, 4, 4))
    finally:
        vae.disable_tiling()


def test_fast_kernels_change_rounding_alone_and_stream_as_a_whole(vae):
    quick = copy.deepcopy(vae)
    use_fast_kernels(quick)
    use_fast_kernels(quick)  # once is enough: twice is once
    latents = torch.randn(1, 4, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    decoder = StreamingDecoder(quick)
    streamed = torch.cat([decoder.decode(part) for part in split(latents, [1, 2, 2])], dim=2)
    with torch.no_grad():
        whole, expected = quick.decode(latents).sample, vae.decode(latents).sample
        codes, expected_codes = quick.encode(whole).latent_dist.mode(), vae.encode(whole).latent_dist.mode()
    assert torch.equal(streamed, whole)
    assert (whole - expected).abs().max() < 1e-5
    assert (codes - expected_codes).abs().max() < 1e-4 * expected_codes.abs().max()
    assert quick.state_dict().keys() == vae.state_dict().keys()
    hooked = [module for module in quick.modules() if getattr(module, "_diffusers_hook", None) is not None]
    assert hooked and all(len(module._diffusers_hook.hooks) == 1 for module in hooked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_kernels_change_half_precision_by_its_rounding(vae, dtype):
    stock, quick = (copy.deepcopy(vae).to(dtype) for _ in range(2))
    use_fast_kernels(quick)
    latents = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = vae.decode(latents).sample
        errors = [(model.decode(latents.to(dtype)).sample.float() - exact).abs().mean() for model in (stock, quick)]
    assert errors[1] < 1.2 * errors[0]


def test_upsampler_gives_the_same_bits(vae):
    quick = copy.deepcopy(vae)
    use_fast_kernels(quick)
    pairs = zip(vae.modules(), quick.modules(), strict=True)
    (stock, fast), *_ = [pair for pair in pairs if isinstance(pair[0], WanUpsample)]
    x = torch.randn(3, 5, 2, 4).transpose(2, 3)
    assert torch.equal(fast(x), stock(x)) and fast(x).shape == (3, 5, 8, 4)


def test_norm_of_nothing_and_of_huge_values_is_the_stock_one(vae):
    quick = copy.deepcopy(vae)
    use_fast_kernels(quick)
    pairs = zip(vae.modules(), quick.modules(), strict=True)
    (stock, fast), *_ = [pair for pair in pairs if isinstance(pair[0], WanRMS_norm)]
    dim = stock.gamma.shape[0]
    x = torch.randn(2, dim, 1, 2, 2) * torch.tensor([0.0, 1e-13, 1.0, 1e15]).view(1, 1, 1, 2, 2)
    torch.testing.assert_close(fast(x), stock(x))
