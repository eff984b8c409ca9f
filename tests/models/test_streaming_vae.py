"""Streamed VAEs, diffusers' whole or in tiles and TAEHV's, equal whole-video ones in any chunking, also when saved."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import tiny_vae as reference
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm, WanUpsample
from safetensors.torch import load, save, save_file

from longtake.models import StreamingTinyDecoder, TinyVae, load_tiny_vae
from longtake.models.streaming_vae import (
    StreamingDecoder,
    StreamingEncoder,
    TiledDecoder,
    _FeatureMap,
    streaming_decoder,
    use_fast_kernels,
)
from longtake.models.tiny_vae import TinyLayout

PATCHED = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
CONFIGS = {
    "wan21": {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]},
    "patched": {**PATCHED, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "scale_factor_spatial": 8},
    "residual": {
        **PATCHED,
        "dim_mult": [1, 2, 2, 2],
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "scale_factor_spatial": 16,
    },
}
LAYOUTS = {
    "wan21": TinyLayout(latent_channels=4, widths=(12, 8, 6, 6)),
    "patched": TinyLayout(latent_channels=4, widths=(8, 6, 6, 4), patch_size=2),
    "grows first": TinyLayout(latent_channels=4, widths=(8, 6, 6, 4), growths=(2, 2, 1)),
}
# Tiles of 5x6 latent positions that overlap by 1 and 2; the last ones of a 12x14 frame are narrower.
TILES = {"height": (40, 32), "width": (48, 32)}


def build(name):
    torch.manual_seed(0)
    return AutoencoderKLWan(**CONFIGS[name], base_dim=4, z_dim=4, num_res_blocks=1).eval()


def build_tiny(name="wan21"):
    torch.manual_seed(0)
    vae = TinyVae(LAYOUTS[name]).eval().requires_grad_(False)
    for name, weight in vae.named_parameters():
        # Wide enough that frames differ, around the middle of [0, 1] so that clamping does not hide it.
        weight.mul_(1.5 if weight.ndim > 1 else 1.0)
        if name == "decoder.22.bias":
            weight.fill_(0.5)
    return vae


def decode_slowly(vae, latents, **variant):
    """A whole video by a tiny decoder, layer by layer."""
    return reference.decode(vae.state_dict(), latents.transpose(1, 2), **variant).transpose(1, 2) * 2 - 1


@pytest.fixture(scope="module", params=[*CONFIGS, *(f"tiny {name}" for name in LAYOUTS)])
def decoder(request):
    """Makes a decoder, decodes a whole video, and how far the two may be apart."""
    if request.param in CONFIGS:
        vae = build(request.param)
        return lambda: StreamingDecoder(vae), lambda z: vae.decode(z, return_dict=False)[0].detach(), 0.0
    tiny = build_tiny(request.param.removeprefix("tiny "))
    return lambda: StreamingTinyDecoder(tiny), lambda z: decode_slowly(tiny, z), 1e-5


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def vae(request):
    return build(request.param)


def tile(vae, *, height=TILES["height"], width=TILES["width"]):
    vae.enable_tiling(height[0], width[0], height[1], width[1])


def random_latents(frames, *, size=(4, 6), batch=2):
    return torch.randn(batch, 4, frames, *size, generator=torch.Generator().manual_seed(1))


def random_frames(frames, size, *, batch=2):
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def continued(stream, fresh):
    """A stream in the state of another, sent through the forms it takes on disk: safetensors bytes and JSON."""
    tensors, numbers = stream.state_dict()
    fresh.load_state_dict(load(save(tensors)), json.loads(json.dumps(numbers)))
    return fresh


def stored_bytes(stream):
    return sum(tensor.untyped_storage().nbytes() for tensor in stream.state_dict()[0].values())


def test_streamed_decode_equals_offline_decode(decoder):
    make, offline, tolerance = decoder
    latents = random_latents(8)
    whole, outputs = offline(latents), []
    assert whole.shape[:3] == (2, 3, 29) and whole.std() > 0.02
    for sizes in ([1] * 8, [3, 3, 2], [8]):
        stream = make()
        parts = [stream.decode(part) for part in latents.split(sizes, dim=2)]
        assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
        outputs.append(torch.cat(parts, dim=2))
    assert (outputs[0] - whole).abs().max() <= tolerance
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_saved_decoder_continues_bit_identically(decoder, stop):
    make, latents = decoder[0], random_latents(8, size=(4, 4))
    whole = make()
    if stop:
        whole.decode(latents[:, :, :stop])
    again, rest = continued(whole, make()), latents[:, :, stop:]
    expected = whole.decode(rest)
    assert torch.equal(again.decode(rest), expected)
    assert stop == 0 or make().decode(rest).shape != expected.shape, "without the state it is another video"


def test_two_streams_share_one_vae_and_their_states_do_not_grow(decoder):
    make, offline, tolerance = decoder
    videos = random_latents(6, size=(4, 4)).split(1)
    streams, parts, sizes = [make(), make()], ([], []), set()
    for start in (0, 2, 4):
        for stream, video, out in zip(streams, videos, parts, strict=True):
            out.append(stream.decode(video[:, :, start : start + 2]))
            sizes.add(stored_bytes(stream))
    for out, video in zip(parts, videos, strict=True):
        assert (torch.cat(out, dim=2) - offline(video)).abs().max() <= tolerance
    assert len(sizes) == 1


def test_streamed_encode_equals_offline_encode(vae):
    # 4x4 latent positions or more: below that the matrix library rounds short and long inputs differently.
    frames = random_frames(29, 4 * vae.spatial_compression_ratio)
    offline = vae.encode(frames).latent_dist.mode().detach()
    for sizes in ([1, *[4] * 7], [5, 7, 3, 2, 12], [2, 2, 25]):
        encoder = StreamingEncoder(vae)
        parts = [encoder.encode(part) for part in frames.split(sizes, dim=2)]
        assert torch.equal(torch.cat(parts, dim=2), offline), sizes


def test_frames_short_of_a_latent_frame_wait(vae):
    encoder, frames = StreamingEncoder(vae), torch.zeros(1, 3, 3, 32, 32)
    counts = [encoder.encode(part).shape[2] for part in (frames, frames[:, :, :1], frames[:, :, :1])]
    assert counts == [1, 0, 1]


def test_saved_encoder_continues_bit_identically(vae):
    frames, whole = random_frames(21, 32, batch=1), StreamingEncoder(vae)
    whole.encode(frames[:, :, :11])
    again = continued(whole, StreamingEncoder(vae))
    assert torch.equal(again.encode(frames[:, :, 11:]), whole.encode(frames[:, :, 11:]))


def test_bad_input_is_refused(vae):
    decoder = StreamingDecoder(vae)
    for shape in ((1, 4, 0, 4, 4), (4, 2, 4, 4)):
        with pytest.raises(ValueError, match="shape"):
            decoder.decode(torch.zeros(shape))
    tensors, numbers = decoder.state_dict()
    for bad, message in (
        ({"num_frames": 1, "slots": ["empty"]}, "slots"),
        ({"num_frames": 1}, "lacks"),
        ({**numbers, "slots": ["what", *numbers["slots"][1:]]}, "known"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.load_state_dict(tensors, bad)
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
    latents = random_latents(5, batch=1)
    decoder = StreamingDecoder(quick)
    streamed = torch.cat([decoder.decode(part) for part in latents.split([1, 2, 2], dim=2)], dim=2)
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
    latents = random_latents(2, batch=1)
    with torch.no_grad():
        exact = vae.decode(latents).sample
        errors = [(model.decode(latents.to(dtype)).sample.float() - exact).abs().mean() for model in (stock, quick)]
    assert errors[1] < 1.2 * errors[0]


def fast_pair(vae, module_class):
    """The first module of a class, as diffusers has it and with fast kernels."""
    quick = copy.deepcopy(vae)
    use_fast_kernels(quick)
    pairs = zip(vae.modules(), quick.modules(), strict=True)
    return next(pair for pair in pairs if isinstance(pair[0], module_class))


def test_upsampler_gives_the_same_bits(vae):
    stock, fast = fast_pair(vae, WanUpsample)
    x = torch.randn(3, 5, 2, 4).transpose(2, 3)
    assert torch.equal(fast(x), stock(x)) and fast(x).shape == (3, 5, 8, 4)


def test_norm_of_nothing_and_of_huge_values_is_the_stock_one(vae):
    stock, fast = fast_pair(vae, WanRMS_norm)
    x = torch.randn(2, stock.gamma.shape[0], 1, 2, 2) * torch.tensor([0.0, 1e-13, 1.0, 1e15]).view(1, 1, 1, 2, 2)
    torch.testing.assert_close(fast(x), stock(x))


@pytest.fixture(scope="module")
def tiled():
    vae = build("patched")
    tile(vae)
    return vae


@pytest.fixture(scope="module")
def latents():
    return random_latents(5, size=(12, 14), batch=1)


@pytest.fixture(scope="module")
def offline(tiled, latents):
    with torch.no_grad():
        return tiled.decode(latents).sample


@pytest.mark.parametrize(("name", "sizes"), [("patched", [3, 2]), ("wan21", [1, 1, 3])])
def test_streamed_tiles_equal_diffusers_tiled_decode(name, sizes, latents):
    vae = build(name)
    tile(vae)
    with torch.no_grad():
        offline = vae.decode(latents).sample
    decoder = streaming_decoder(vae)
    assert isinstance(decoder, TiledDecoder)
    parts = [decoder.decode(part) for part in latents.split(sizes, dim=2)]
    assert parts[0].shape == (1, 3, 1 + 4 * (sizes[0] - 1), 96, 112)
    assert torch.equal(torch.cat(parts, dim=2), offline)
    vae.disable_tiling()
    whole = streaming_decoder(vae).decode(latents[:, :, :2])
    assert not torch.equal(whole, offline[:, :, : whole.shape[2]]), "tiles are another decode than whole frames"


def test_a_frame_no_larger_than_a_tile_is_decoded_whole(tiled):
    latents = random_latents(3, size=(5, 6))
    with torch.no_grad():
        assert torch.equal(TiledDecoder(tiled).decode(latents), tiled.decode(latents).sample)


@pytest.mark.parametrize("stop", [0, 3])
def test_a_saved_stream_continues_bit_identically_with_all_its_tiles(tiled, latents, offline, stop):
    first = TiledDecoder(tiled)
    begun = first.decode(latents[:, :, :stop]) if stop else offline[:, :, :0]
    # Rows begin at 0, 4 and 8, columns at 0, 4, 8 and 12.
    names = {f"tile_{row}_{column}" for row in range(3) for column in range(4)}
    assert {key.split(".")[0] for key in first.state_dict()[0]} == (names if stop else set())
    second = continued(first, TiledDecoder(tiled))
    assert torch.equal(torch.cat([begun, second.decode(latents[:, :, stop:])], dim=2), offline)


def test_a_state_without_one_tile_or_of_other_tiles_is_refused(tiled, latents):
    decoder = TiledDecoder(tiled)
    decoder.decode(latents[:, :, :2])
    tensors, numbers = decoder.state_dict()
    slots = {name: kinds for name, kinds in numbers["slots"].items() if name != "tile_0_1"}
    for state, message in (
        (({k: v for k, v in tensors.items() if "tile_1_2" not in k}, numbers), "lacks"),
        ((tensors, numbers | {"slots": slots}), "lacks 'tile_0_1'"),
        ((tensors, numbers | {"tiling": numbers["tiling"] | {"width": 7}}), "enable_tiling with the sizes"),
        (StreamingDecoder(tiled).state_dict(), "without tiling"),
    ):
        with pytest.raises(ValueError, match=message):
            TiledDecoder(tiled).load_state_dict(*state)
    with pytest.raises(ValueError, match="start another"):
        decoder.decode(latents[..., :10, :])


def test_tiles_that_leave_gaps_are_refused(tiled):
    for height, width, message in (
        ((40, 48), TILES["width"], "stride at most the height"),
        (TILES["height"], (44, 32), "multiples of 8"),
    ):
        tile(tiled, height=height, width=width)
        try:
            with pytest.raises(ValueError, match=message):
                streaming_decoder(tiled)
        finally:
            tile(tiled)


def test_tiles_are_for_decoding_and_a_stream_keeps_those_it_began_with(tiled, latents, offline):
    with pytest.raises(ValueError, match="streaming_decoder"):
        StreamingDecoder(tiled).decode(latents)
    decoder = TiledDecoder(tiled)
    first = decoder.decode(latents[:, :, :2])
    frames = offline[:, :, :5].contiguous()
    encoded = StreamingEncoder(tiled).encode(frames)
    tiled.disable_tiling()
    try:
        rest = decoder.decode(latents[:, :, 2:])
        assert torch.equal(encoded, StreamingEncoder(tiled).encode(frames))
    finally:
        tile(tiled)
    assert torch.equal(torch.cat([first, rest], dim=2), offline)


def test_tiles_rest_in_host_memory_and_never_grow(tiled, latents, monkeypatch):
    moves = []
    monkeypatch.setattr(_FeatureMap, "move", lambda features, device: moves.append((id(features), str(device))))
    decoder = TiledDecoder(tiled)
    sizes = []
    for start in (0, 2, 3):
        decoder.decode(latents[:, :, start : start + 2])
        sizes.append(stored_bytes(decoder))
    assert sizes[0] == sizes[1] == sizes[2]
    # A tile comes, is decoded and goes before the next one comes.
    assert len(moves) == 2 * 12 * 3
    assert all(a[0] == b[0] and b[1] == "cpu" for a, b in zip(moves[::2], moves[1::2], strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tiny_decoder_remembers_the_frame_before(name):
    vae, z = build_tiny(name), random_latents(6)
    assert (decode_slowly(vae, z, with_memory=False) - StreamingTinyDecoder(vae).decode(z)).abs().max() > 1e-2


def test_half_precision_of_a_tiny_decoder_is_half_precision():
    vae, z = build_tiny(), random_latents(6)
    exact = StreamingTinyDecoder(vae).decode(z)
    half = build_tiny().bfloat16()
    frames = StreamingTinyDecoder(half).decode(half.denormalise(z.transpose(1, 2)))
    assert frames.dtype == torch.bfloat16 and (frames.float() - exact).abs().max() < 0.1


def published():
    """Names and shapes of the decoder in ``taew2_1``, written out."""
    shapes = {"1.weight": (256, 16, 3, 3), "1.bias": (256,), "22.weight": (3, 64, 3, 3), "22.bias": (3,)}
    for width, places in ((256, (3, 4, 5)), (128, (9, 10, 11)), (64, (15, 16, 17))):
        for place in places:
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"{place}.conv.{layer}.weight"] = (width, inputs, 3, 3)
                shapes[f"{place}.conv.{layer}.bias"] = (width,)
    shapes |= {"7.conv.weight": (256, 256, 1, 1), "8.weight": (128, 256, 3, 3)}
    shapes |= {"13.conv.weight": (256, 128, 1, 1), "14.weight": (64, 128, 3, 3)}
    shapes |= {"19.conv.weight": (128, 64, 1, 1), "20.weight": (64, 64, 3, 3)}
    return {f"decoder.{name}": shape for name, shape in shapes.items()}


def test_published_layout():
    with torch.device("meta"):
        vae = TinyVae()
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == published()
    assert len(published()) == 64
    assert sum(tensor.numel() for tensor in vae.state_dict().values()) == 9_844_611
    assert TinyLayout.of(published()) == TinyLayout()
    assert (vae.layout.frames_per_latent, vae.layout.pixels_per_latent) == (4, 8)


def test_files_load_strictly(tmp_path):
    vae = build_tiny()
    tensors = {name: tensor.half() for name, tensor in vae.state_dict().items()}
    encoder = {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}
    torch.save(tensors | encoder, tmp_path / "tiny.pth")
    save_file(tensors | encoder, tmp_path / "tiny.safetensors")
    for name in ("tiny.pth", "tiny.safetensors"):
        loaded = load_tiny_vae(tmp_path / name)
        assert loaded.layout == vae.layout and not loaded.training
        for key, tensor in loaded.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[key].float()), key

    rest = {name: tensor for name, tensor in tensors.items() if name != "decoder.9.conv.2.bias"}
    for changed, message in (
        (rest, r"missing: 1 \(decoder.9.conv.2.bias\)"),
        (tensors | {"decoder.23.weight": torch.zeros(1)}, r"extra: 1 \(decoder.23.weight\)"),
        (tensors | {"decoder.4.conv.2.bias": torch.zeros(5)}, r"1 misshapen: decoder.4.conv.2.bias is \[5\], should"),
        (tensors | {"decoder.1.weight": torch.zeros(3)}, "misshapen"),
        ({"blocks.0.weight": torch.zeros(())}, r"missing: 64 \(decoder.1.bias.* and 59 more.*extra: 1 \(blocks.0"),
    ):
        save_file(changed, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=f"is no TAEHV decoder.*{message}"):
            load_tiny_vae(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.pth", lambda path: None, "does not exist"),
        ("text.pth", lambda path: path.write_text("not weights"), "cannot read the fast VAE"),
        ("text.safetensors", lambda path: path.write_text("not weights"), "cannot read the fast VAE"),
        ("list.pth", lambda path: torch.save([1, 2], path), "no mapping"),
        ("code.pth", lambda path: path.write_bytes(pickle.dumps({"a": Path("x")}, 2)), "cannot read the fast VAE"),
    ],
)
def test_files_that_are_none_are_refused(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_tiny_vae(tmp_path / name)


def test_bad_input_of_a_tiny_decoder_is_refused():
    stream = StreamingTinyDecoder(build_tiny())
    for shape in ((1, 4, 0, 3, 4), (4, 2, 3, 4), (1, 12, 1, 3, 4)):
        with pytest.raises(ValueError, match="latents have shape"):
            stream.decode(torch.zeros(shape))
    tensors, numbers = stream.state_dict()
    for state, message in (
        (({}, {}), "lacks 'num_frames'"),
        ((tensors | {"slot_000": torch.zeros(1, 4, 1, 2, 2)}, numbers), "not written by this fast VAE"),
        (({}, {"num_frames": 3, "slots": ["empty"]}), "not written by this fast VAE"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict(*state)
