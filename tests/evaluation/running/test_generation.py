"""Making an evaluation's videos: whole files or none, what their lines say, and what is refused before any work."""

import errno

import imageio.v3
import numpy as np
import pytest

from longtake.evaluation.records import read_json
from longtake.evaluation.running import workers
from longtake.evaluation.running.plan import plan_generation
from longtake.evaluation.running.protocol import Protocol, resolve_generation
from longtake.evaluation.running.suites import Change, Prompt
from longtake.evaluation.running.workers import _Generator
from longtake.pipelines.video_file import VideoWriter

CACHES = {"window": {"policy": "sliding_window"}, "long": {"policy": "longlive"}}
SAMPLER = {"name": "few_step", "timesteps": [1000, 500]}
RED, BLUE = "a red circle moving left", "a blue square"


@pytest.fixture(scope="module")
def make_generator(tiny_folder):
    """Loads the random model for a protocol."""

    def make(**settings):
        protocol = Protocol(
            **{"model": str(tiny_folder), "family": "mini", "caches": CACHES, "seconds": 1.5, "sampler": SAMPLER}
            | settings
        )
        return _Generator(resolve_generation(protocol), device="cpu")

    return make


@pytest.fixture(scope="module")
def generator(make_generator):
    """Makes videos of a second and a half, two together."""
    return make_generator(batch=2)


def costs_of(unit):
    return read_json(unit.record_path)["costs"]


def units(generator, prompts, out, label=0):
    return plan_generation(generator.protocol, prompts, out)[label].units


def test_videos_lines_and_costs(generator, tmp_path):
    (unit,) = units(generator, [Prompt(text=RED), Prompt(text=BLUE, extended="a blue square moving right")], tmp_path)
    generator.check([unit])
    shares = []
    lines = generator.make(unit, on_share=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert unit.finished_lines() == lines and unit.videos_exist(lines)
    for line in lines:
        frames = imageio.v3.imread(tmp_path / "window" / line.file)
        assert frames.shape == (25, 64, 64, 3) == (line.num_frames, line.height, line.width, 3)
        assert (line.fps, line.chunk_starts, line.encoder["crf"]) == (16, (0, 9, 21), 12)
        assert line.segments == () and len(line.sha256) == 64 and line.config_hash
    assert lines[1].prompt == BLUE and lines[1].prompt_extended == "a blue square moving right"
    assert set(costs_of(unit)) == {"ms_per_block", "kv_mb", "kv_mb_peak", "first_frame_s", "generation_cpu_s"}
    assert all(value > 0 for value in costs_of(unit).values())
    assert not list(tmp_path.rglob("*.tmp*"))
    first = {line.file: (tmp_path / "window" / line.file).read_bytes() for line in lines}
    assert generator.make(unit, on_share=shares.append) == lines
    assert {name: (tmp_path / "window" / name).read_bytes() for name in first} == first


def test_a_label_with_attention_is_sparse_and_says_how_sparse(make_generator, tmp_path):
    radial = {"policy": "radial", "block_size": 4, "thin_below": 8, "dense_layers": 0, "dense_steps": 0}
    caches = {"dense": {"policy": "sliding_window"}, "sparse": {"policy": "sliding_window", "attention": radial}}
    generator = make_generator(caches=caches)
    found = {}
    for number, label in enumerate(caches):
        (unit,) = units(generator, [Prompt(text=RED)], tmp_path, label=number)
        generator.check([unit])
        found[label] = (
            generator.make(unit, on_share=lambda share: None)[0].sha256,
            costs_of(unit)["attention_density"],
        )
    assert found["dense"][1] == 1.0 > found["sparse"][1] > 0.3
    assert found["dense"][0] != found["sparse"][0]


def test_extended_prompts_are_what_the_model_reads(generator, tmp_path):
    plain = units(generator, [Prompt(text=RED)], tmp_path / "a")[0]
    other = units(generator, [Prompt(text=BLUE, extended=RED)], tmp_path / "b")[0]
    one, two = (generator.make(unit, on_share=lambda share: None)[0] for unit in (plain, other))
    assert one.sha256 == two.sha256 and (one.prompt, two.prompt) == (RED, BLUE)


def test_prompts_over_time_start_with_a_block(make_generator, tmp_path):
    generator = make_generator(segment_event="recache")
    prompt = Prompt(text=RED, changes=(Change(start_s=0.7, text="then a square", extended=BLUE),))
    unit = units(generator, [prompt], tmp_path, label=1)[0]
    line = generator.make(unit, on_share=lambda share: None)[0]
    # 0.7 s is frame 11.2; the first block after it begins at frame 21.
    assert [(s.start_s, s.end_s, s.prompt) for s in line.segments] == [
        (0.0, 21 / 16, RED),
        (21 / 16, 25 / 16, "then a square"),
    ]
    steady = units(generator, [Prompt(text=RED)], tmp_path / "steady", label=1)[0]
    still = generator.make(steady, on_share=lambda share: None)[0]
    changed, same = (
        imageio.v3.imread(folder / "long" / line.file).astype(int) for folder in (tmp_path, tmp_path / "steady")
    )
    assert still.sha256 != line.sha256 and np.array_equal(changed[:16], same[:16])
    assert not np.array_equal(changed[21:], same[21:])


def test_a_full_disk_leaves_no_half_video_under_its_name(generator, tmp_path, monkeypatch):
    (unit,) = units(generator, [Prompt(text=RED), Prompt(text=BLUE)], tmp_path)

    class Full(VideoWriter):
        def write(self, frames):
            if self.num_frames > 5:
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
            super().write(frames)

    monkeypatch.setattr(workers, "VideoWriter", Full)
    with pytest.raises(OSError, match="No space left"):
        generator.make(unit, on_share=lambda share: None)
    assert not list((tmp_path / "window" / "videos").iterdir())
    assert read_json(unit.record_path) is None and unit.finished_lines() == ()


def test_what_would_fail_in_the_middle_is_refused_before(generator, make_generator, tmp_path):
    long = Prompt(text=RED, changes=(Change(start_s=1.0, text="a circle " * 20),))
    with pytest.raises(ValueError, match="tokens, this model reads 32: shorten it"):
        generator.check(units(generator, [Prompt(text=RED), long], tmp_path))
    cutting = make_generator(segment_event="cut")
    changing = Prompt(text=RED, changes=(Change(start_s=0.7, text=BLUE),))
    with pytest.raises(ValueError, match="cache 'window': .*does not support the prompt event 'cut'"):
        cutting.check(units(cutting, [changing], tmp_path))
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_another_precision(make_generator, tmp_path):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        generator = make_generator(dtype=dtype, seconds=0.5)
        unit = units(generator, [Prompt(text=RED)], tmp_path / dtype)[0]
        (line,) = generator.make(unit, on_share=lambda share: None)
        sizes[dtype] = (line.sha256, line.config_hash)
    assert sizes["float32"][0] != sizes["bfloat16"][0] and sizes["float32"][1] != sizes["bfloat16"][1]


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        _Generator(Protocol(model=str(tmp_path / "nowhere"), family="mini", caches=CACHES), device="cpu")
