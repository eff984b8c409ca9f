"""Streamed decode in tiles equals diffusers' own tiled decode bit for bit, and continues from a saved state."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load, save

from longtake.models.streaming_vae import (
    StreamingDecoder,
    StreamingEncoder,
    TiledDecoder,
    _FeatureMap,
    streaming_decoder,
)

COMMON = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
CONFIGS = {
    "wan21": {**COMMON, "dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]},
    "patched": {
        **COMMON,
        **{"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 8},
        **{"dim_mult": [1, 1, 1], "temperal_downsample": [True, True]},
    },
}
# Tiles of 5x6 latent positions that overlap by 1 and 2; the last ones of a 12x14 frame are narrower.
TILES = {"height": (40, 32), "width": (48, 32)}


def tile(vae, *, height=TILES["height"], width=TILES["width"]):
    vae.enable_tiling(height[0], width[0], height[1], width[1])


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def vae(request):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIGS[request.param]).eval()
    tile(vae)
    return vae


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 4, 5, 12, 14, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def offline(vae, latents):
    with torch.no_grad():
        return vae.decode(latents).sample


@pytest.mark.parametrize("sizes", [[3, 2], [1, 1, 3], [5]])
def test_streamed_tiles_equal_diffusers_tiled_decode(vae, latents, offline, sizes):
    decoder = streaming_decoder(vae)
    assert isinstance(decoder, TiledDecoder)
    parts = [decoder.decode(part) for part in latents.split(sizes, dim=2)]
    assert parts[0].shape == (1, 3, 1 + 4 * (sizes[0] - 1), 96, 112)
    assert torch.equal(torch.cat(parts, dim=2), offline)


def test_tiles_are_another_decode_than_whole_frames(vae, latents, offline):
    vae.disable_tiling()
    try:
        whole = streaming_decoder(vae).decode(latents)
    finally:
        tile(vae)
    assert whole.shape == offline.shape and not torch.equal(whole, offline)
    # Where a tile sees all that the decoder looks at, its pixels are the whole frame's up to the seams' neighbours.
    assert (whole - offline).abs().mean() < 0.5 * (whole - whole.mean()).abs().mean()


def test_a_frame_no_larger_than_a_tile_is_decoded_whole(vae):
    latents = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(TiledDecoder(vae).decode(latents), vae.decode(latents).sample)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_saved_stream_continues_bit_identically_with_all_its_tiles(vae, latents, offline, stop):
    first = TiledDecoder(vae)
    begun = first.decode(latents[:, :, :stop]) if stop else offline[:, :, :0]
    tensors, numbers = first.state_dict()
    tensors, numbers = load(save(tensors)), json.loads(json.dumps(numbers))
    # Rows begin at 0, 4 and 8, columns at 0, 4, 8 and 12.
    names = {f"tile_{row}_{column}" for row in range(3) for column in range(4)}
    assert {key.split(".")[0] for key in tensors} == (names if stop else set())
    second = TiledDecoder(vae)
    second.load_state_dict(tensors, numbers)
    assert torch.equal(torch.cat([begun, second.decode(latents[:, :, stop:])], dim=2), offline)


def test_a_state_without_one_tile_or_of_other_tiles_is_refused(vae, latents):
    decoder = TiledDecoder(vae)
    decoder.decode(latents[:, :, :2])
    tensors, numbers = decoder.state_dict()
    with pytest.raises(ValueError, match="lacks"):
        TiledDecoder(vae).load_state_dict({k: v for k, v in tensors.items() if "tile_1_2" not in k}, numbers)
    with pytest.raises(ValueError, match="lacks 'tile_0_1'"):
        slots = {name: kinds for name, kinds in numbers["slots"].items() if name != "tile_0_1"}
        TiledDecoder(vae).load_state_dict(tensors, numbers | {"slots": slots})
    with pytest.raises(ValueError, match="enable_tiling with the sizes"):
        TiledDecoder(vae).load_state_dict(tensors, numbers | {"tiling": numbers["tiling"] | {"width": 7}})
    with pytest.raises(ValueError, match="without tiling"):
        TiledDecoder(vae).load_state_dict(*StreamingDecoder(vae).state_dict())
    with pytest.raises(ValueError, match="start another"):
        decoder.decode(latents[..., :10, :])


def test_tiles_that_leave_gaps_are_refused(vae):
    for height, width, message in (
        ((40, 48), TILES["width"], "stride at most the height"),
        (TILES["height"], (44, 32), "multiples of 8"),
    ):
        tile(vae, height=height, width=width)
        try:
            with pytest.raises(ValueError, match=message):
                streaming_decoder(vae)
        finally:
            tile(vae)


def test_tiles_are_for_decoding_and_a_stream_keeps_those_it_began_with(vae, latents, offline):
    with pytest.raises(ValueError, match="streaming_decoder"):
        StreamingDecoder(vae).decode(latents)
    decoder = TiledDecoder(vae)
    first = decoder.decode(latents[:, :, :2])
    frames = offline[:, :, :5].contiguous()
    tiled = StreamingEncoder(vae).encode(frames)
    vae.disable_tiling()
    try:
        rest = decoder.decode(latents[:, :, 2:])
        assert torch.equal(tiled, StreamingEncoder(vae).encode(frames))
    finally:
        tile(vae)
    assert torch.equal(torch.cat([first, rest], dim=2), offline)


def test_tiles_rest_in_host_memory_and_never_grow(vae, latents, monkeypatch):
    moves = []
    monkeypatch.setattr(_FeatureMap, "move", lambda features, device: moves.append((id(features), str(device))))
    decoder = TiledDecoder(vae)
    sizes = []
    for start in (0, 2, 3):
        decoder.decode(latents[:, :, start : start + 2])
        tensors, _ = decoder.state_dict()
        sizes.append(sum(tensor.numel() for tensor in tensors.values()))
    assert sizes[0] == sizes[1] == sizes[2]
    # A tile comes, is decoded and goes before the next one comes.
    assert len(moves) == 2 * 12 * 3
    assert all(a[0] == b[0] and b[1] == "cpu" for a, b in zip(moves[::2], moves[1::2], strict=True))
