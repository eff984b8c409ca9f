"""The streamed tiny decoder equals a whole-video one, and loads TAEHV's layout strictly."""

import json
import pickle
from pathlib import Path

import pytest
import tiny_vae as reference
import torch
from safetensors.torch import load, save, save_file

from longtake.models import StreamingTinyDecoder, TinyVae, load_tiny_vae
from longtake.models.tiny_vae import TinyLayout

LAYOUTS = {
    "wan21": TinyLayout(latent_channels=4, widths=(12, 8, 6, 6)),
    "patched": TinyLayout(latent_channels=4, widths=(8, 6, 6, 4), patch_size=2),
    "grows first": TinyLayout(latent_channels=4, widths=(8, 6, 6, 4), growths=(2, 2, 1)),
}
SIZES = [[1] * 6, [3, 3], [2, 1, 3], [6]]


def build(layout=LAYOUTS["wan21"], seed=0):
    torch.manual_seed(seed)
    vae = TinyVae(layout).eval().requires_grad_(False)
    for name, weight in vae.named_parameters():
        # Wide enough that frames differ, around the middle of [0, 1] so that clamping does not hide it.
        weight.mul_(1.5 if weight.ndim > 1 else 1.0)
        if name == "decoder.22.bias":
            weight.fill_(0.5)
    return vae


def latents(batch=1, frames=6):
    return torch.randn(batch, 4, frames, 3, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_streamed_equals_whole_video(name, batch):
    vae, z = build(LAYOUTS[name]), latents(batch)
    whole = reference.decode(vae.state_dict(), z.transpose(1, 2)).transpose(1, 2) * 2 - 1
    factor = LAYOUTS[name].pixels_per_latent
    assert whole.shape == (batch, 3, 21, 3 * factor, 4 * factor) and whole.std() > 0.02
    outputs = []
    for sizes in SIZES:
        stream = StreamingTinyDecoder(vae)
        parts = [stream.decode(part) for part in z.split(sizes, dim=2)]
        assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
        outputs.append(torch.cat(parts, dim=2))
    assert (outputs[0] - whole).abs().max() < 1e-5
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    wrong = reference.decode(vae.state_dict(), z.transpose(1, 2), with_memory=False).transpose(1, 2) * 2 - 1
    assert (wrong - whole).abs().max() > 1e-2


def test_saved_stream_goes_on_bit_for_bit():
    vae, z = build(), latents(2)
    for stop in (0, 1, 4):
        whole, continued = StreamingTinyDecoder(vae), StreamingTinyDecoder(vae)
        if stop:
            whole.decode(z[:, :, :stop])
        tensors, numbers = whole.state_dict()
        continued.load_state_dict(load(save(tensors)), json.loads(json.dumps(numbers)))
        assert torch.equal(continued.decode(z[:, :, stop:]), whole.decode(z[:, :, stop:]))


def test_memory_does_not_grow_and_streams_share_weights():
    vae, z = build(), latents()
    alone = StreamingTinyDecoder(vae).decode(z)
    first, second, kept = StreamingTinyDecoder(vae), StreamingTinyDecoder(vae), []
    for frame in z.split(1, dim=2):
        first.decode(frame)
        second.decode(-frame)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in first.state_dict()[0].values()))
    assert len(first.state_dict()[0]) == 9 and len(set(kept)) == 1
    assert torch.equal(StreamingTinyDecoder(vae).decode(z), alone)


def test_half_precision_runs_in_half_precision():
    vae, z = build(), latents()
    exact = StreamingTinyDecoder(vae).decode(z)
    half = build().bfloat16()
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
    vae = build()
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


def test_bad_input_is_refused():
    stream = StreamingTinyDecoder(build())
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
