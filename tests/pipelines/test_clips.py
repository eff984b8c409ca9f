"""Clips and images: which frames of them count, at which size, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from longtake.configs.families import ModelFamily
from longtake.pipelines.conditioning import _to_pixels, make_clip, make_clips, make_stills, plan_cut
from longtake.pipelines.video_file import VideoFormat, VideoWriter

SQUARE = {"family": ModelFamily(), "height": 64, "width": 64}
PROCESSOR = VideoProcessor(vae_scale_factor=8)


def numbered(num_frames, height=32, width=32):
    """Frame i is of the grey i."""
    return np.broadcast_to(np.arange(num_frames, dtype=np.uint8)[:, None, None, None], (num_frames, height, width, 3))


def numbers(clip, **settings):
    """Frames that a cut takes, read from their greys."""
    cut = plan_cut(clip, "video", **SQUARE | {"family": ModelFamily(**settings)})
    return [np.asarray(frame)[0, 0, 0] for frame in clip.take(cut.indices)], cut


@pytest.mark.parametrize(("num_frames", "num_latents"), [(9, 3), (20, 3), (21, 6), (80, 18), (81, 21), (92, 21)])
def test_the_end_of_a_clip_is_kept_in_whole_blocks(num_frames, num_latents):
    found, cut = numbers(make_clip(numbered(num_frames)))
    kept = 1 + 4 * (num_latents - 1)
    assert found == list(range(num_frames - kept, num_frames))
    assert (cut.num_latent_frames, cut.num_left_out) == (num_latents, num_frames - kept)


@pytest.mark.parametrize(("first", "block", "num_latents"), [(1, 3, 19), (1, 1, 20), (3, 4, 19), (4, 4, 20)])
def test_a_first_block_of_another_length_counts(first, block, num_latents):
    _, cut = numbers(make_clip(numbered(80)), first_block_frames=first, frames_per_block=block)
    assert cut.num_latent_frames == num_latents


@pytest.mark.parametrize("fps", [8, 12.5, 15, 24, 24000 / 1001, 30, 60, 120])
def test_every_moment_takes_the_nearest_frame_counted_back_from_the_last(fps):
    clip = make_clip(numbered(200), fps=fps)
    found, cut = numbers(clip)
    moments = 199 - np.arange(len(found))[::-1] / 16 * fps
    assert found[-1] == 199 and min(moments) >= -1e-6
    assert (np.abs(np.array(found, float) - moments) <= 0.5 + 1e-9).all()
    assert cut.num_left_out < 12
    # Another 12 frames would not have been there.
    assert 199 - (len(found) + 11) / 16 * fps < 0


def test_only_the_last_seconds_are_taken():
    found, _ = numbers(make_clip(numbered(200), seconds=5))
    assert found == list(range(200 - 81, 200))
    found, _ = numbers(make_clip(numbered(250), fps=24, seconds=2))
    assert len(found) == 33 and found[0] == round(249 - 32 * 1.5)
    assert len(numbers(make_clip(numbered(50), seconds=500))[0]) == 45


def test_too_short_a_clip_says_how_long_it_has_to_be():
    with pytest.raises(ValueError, match=r"has 8 frames .*takes 9: give 0.56 s or more"):
        numbers(make_clip(numbered(8)))
    with pytest.raises(ValueError, match="has 5 frames"):
        numbers(make_clip(numbered(200), seconds=0.3))


def test_all_forms_of_a_clip_give_the_same_pixels(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    size = {"height": 32, "width": 48}
    expected = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    floats = torch.from_numpy(frames).float() / 255
    forms = {
        "array": frames,
        "tensor, channels first": torch.from_numpy(frames).movedim(-1, 1),
        "floats": floats,
        "float array": floats.numpy(),
        "list of arrays": list(frames),
        "images": [Image.fromarray(frame) for frame in frames],
    }
    for name, form in forms.items():
        clip = make_clip(form)
        pixels = _to_pixels(list(clip.take(range(9))), PROCESSOR, **size)
        assert (pixels - expected).abs().max() < 1e-6, name
    batches = (np.stack([frames, frames]), torch.from_numpy(frames).movedim(-1, 1)[None].expand(2, -1, -1, -1, -1))
    for clips in (make_clips(batches[0]), make_clips(batches[1]), make_clips([frames, list(frames)])):
        assert [clip.num_frames for clip in clips] == [9, 9]
    assert len(make_clips(list(frames))) == len(make_clips(forms["images"])) == 1


def test_other_sizes_cover_the_video_and_keep_the_middle():
    """Left, middle and right thirds of different greys: a square keeps the middle."""
    wide = np.repeat(np.array([0, 100, 200], np.uint8), 64)[None, :, None].repeat(64, 0).repeat(3, 2)
    (frame,) = make_stills(wide)[0].take([0])
    pixels = _to_pixels([frame], PROCESSOR, height=32, width=32)
    assert pixels.shape == (3, 1, 32, 32)
    assert ((pixels[..., 4:-4] + 1) * 127.5 - 100).abs().max() < 1
    tall = _to_pixels([Image.fromarray(wide)], PROCESSOR, height=64, width=192)
    assert torch.equal(tall, torch.from_numpy(wide).permute(2, 0, 1)[:, None].float() / 127.5 - 1)
    # Floats of another size go the same way, at eight bits.
    assert torch.equal(
        _to_pixels([torch.from_numpy(wide).permute(2, 0, 1) / 255], PROCESSOR, height=32, width=32), pixels
    )


def test_files_are_read_as_they_are_needed(tmp_path):
    path = tmp_path / "clip.mp4"
    frames = np.repeat(np.linspace(20, 220, 50).astype(np.uint8), 64 * 64 * 3).reshape(50, 64, 64, 3)
    with VideoWriter(path, video_format=VideoFormat(height=64, width=64, fps=25, crf=1)) as writer:
        writer.write(frames)
    clip = make_clip(path, seconds=1)
    assert (clip.num_frames, clip.fps, clip.height, clip.width) == (50, 25, 64, 64)
    cut = plan_cut(clip, "video", **SQUARE)
    found = np.stack([np.asarray(frame) for frame in clip.take(cut.indices)])
    assert len(found) == 9 and np.abs(found.astype(int) - frames[list(cut.indices)]).max() <= 3
    with pytest.raises(ValueError, match="damaged|decodes to|cut off"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        list(clip.take(cut.indices))


def test_image_files_are_turned_and_made_rgb(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.save(tmp_path / "turned.png", exif=exif)
    still = make_stills(tmp_path / "turned.png")[0]
    assert (still.height, still.width, still.num_frames) == (16, 8, 1)
    image.convert("P").save(tmp_path / "palette.gif")
    (frame,) = make_stills(str(tmp_path / "palette.gif"))[0].take([0])
    assert frame.mode == "RGB" and frame.size == (16, 8)
    assert len(make_stills([pixels, image])) == len(make_stills(np.stack([pixels, pixels]))) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: make_clip(p / "none.mp4"), "there is no video"),
        (lambda p: make_clip(p / "text.mp4"), "cannot read .* as a video"),
        (lambda p: make_stills(p / "none.png"), "there is no image"),
        (lambda p: make_stills(p / "text.mp4"), "cannot read .* as an image"),
        (lambda p: make_clip([]), "no frames"),
        (lambda p: make_clip(np.zeros((0, 32, 32, 3), np.uint8)), r"shape \(0, 32, 32, 3\)"),
        (lambda p: make_clip(np.zeros((9, 32, 32, 4), np.uint8)), "3 channels"),
        (lambda p: make_clip(np.zeros((9, 32, 32), np.uint8)), "4 dimensions"),
        (lambda p: make_clip(np.full((9, 32, 32, 3), 2.0)), r"float64 outside \[0, 1\]"),
        (lambda p: make_clip(np.full((9, 32, 32, 3), np.nan)), r"outside \[0, 1\]"),
        (lambda p: make_clip(np.zeros((9, 32, 32, 3), np.int64)), "int64"),
        (lambda p: make_clip(7), "is a int"),
        (lambda p: make_clip([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)]), "differ in size"),
        (lambda p: make_clip(np.zeros((9, 32, 32, 3), np.uint8), fps=0), "fps=0"),
        (lambda p: make_clip(np.zeros((9, 32, 32, 3), np.uint8), seconds=float("nan")), "seconds=nan"),
        (lambda p: make_stills([]), "empty"),
        (
            lambda p: plan_cut(make_clip(np.zeros((9, 8, 640, 3), np.uint8)), "video", **SQUARE),
            "1.2% of the",
        ),
    ],
)
def test_what_is_no_clip_is_named(tmp_path, make, message):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=message):
        make(tmp_path)
