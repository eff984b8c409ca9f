"""Radial attention against the authors' masks, a token-by-token version, closed forms and published densities."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import radial as reference
import torch
from block_attention import signature
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sparse import EAGER, with_role

from longtake.attention import AttentionGeometry
from longtake.attention.geometry import make_geometry
from longtake.attention.policies.radial import Radial

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "radial_masks.safetensors"
# (tokens of a frame, decay factor): density by frames, blocks of 128.
DENSITIES = {
    (256, 1.0): {18: 0.651, 21: 0.601, 42: 0.395, 84: 0.245, 168: 0.147},
    (1536, 1.0): {18: 0.506, 21: 0.468, 42: 0.317, 84: 0.202},
    (1536, 0.2): {18: 0.396, 21: 0.369, 42: 0.261, 84: 0.172},
    (1560, 1.0): {18: 0.481, 21: 0.444, 42: 0.291},
    (1560, 0.2): {18: 0.364},
    (3840, 1.0): {18: 0.431, 21: 0.394, 42: 0.260},
    (3840, 0.2): {18: 0.287, 21: 0.261, 42: 0.179},
}


def active(policy):
    return replace(policy, **EAGER)


def strip(policy, *args, **options):
    return active(policy).plan(None, None, make_geometry(*args, **options))


def video_mask(num_frames, tokens, **options):
    return Radial(**options).video_mask(num_frames, tokens)


@pytest.mark.parametrize("case", ["a", "d"])
def test_golden_masks_bit_for_bit(case):
    with safe_open(GOLDEN, "pt") as file:
        values = json.loads(file.metadata()["cases"])[case]
        expected = file.get_tensor(case)
    density = values.pop("density")
    mask = video_mask(values.pop("num_frames"), values.pop("tokens_per_frame"), **values)
    assert torch.equal(mask, expected)
    assert mask.float().mean().item() == pytest.approx(density, abs=1e-6)
    wrong = video_mask(mask.shape[0] * values["block_size"] // 384, 384, block_size=values["block_size"])
    assert wrong.shape != mask.shape or not torch.equal(wrong, expected)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    num_frames=st.integers(1, 9),
    tokens=st.integers(16, 110),
    block_size=st.sampled_from([8, 16, 32]),
    decay_factor=st.sampled_from([0.2, 0.5, 0.95, 1.0, 2.0]),
    model=st.sampled_from(["wan", "hunyuan"]),
    adjacent=st.sampled_from(["full", "half"]),
    thin_below=st.sampled_from([8, 32, 128]),
)
def test_equal_to_the_slow_version(num_frames, tokens, block_size, decay_factor, model, adjacent, thin_below):
    options = {"block_size": block_size, "decay_factor": decay_factor, "model": model, "thin_below": thin_below}
    mask = video_mask(num_frames, tokens, adjacent_width=adjacent, **options)
    slow = reference.block_mask(num_frames, tokens, adjacent=adjacent, **options)
    whole = num_frames * tokens // block_size
    assert mask.shape == (math.ceil(num_frames * tokens / block_size),) * 2
    assert torch.equal(mask[:whole, :whole], slow)


@pytest.mark.parametrize(("num_frames", "tokens", "block_size"), [(5, 200, 64), (6, 1560, 128), (4, 1560, 64)])
def test_tokens_behind_the_last_whole_block_are_covered(num_frames, tokens, block_size):
    """The source leaves them out, or fails; the last frame's own tokens are read, and the first frame by all."""
    mask = video_mask(num_frames, tokens, block_size=block_size)
    assert num_frames * tokens % block_size and mask[-1, -1]
    assert mask[:, 0].all() and mask.diagonal().all() and mask[-1, :2].all()
    near = tokens // block_size // 2
    assert mask[-1, -near:].all() and mask[-near:, -1].all()


@pytest.mark.parametrize(("tokens", "decay_factor"), DENSITIES)
def test_densities_are_the_published_ones(tokens, decay_factor):
    for num_frames, density in DENSITIES[tokens, decay_factor].items():
        mask = video_mask(num_frames, tokens, decay_factor=decay_factor)
        assert mask.float().mean().item() == pytest.approx(density, abs=1e-3), num_frames


@pytest.mark.parametrize(
    ("tokens", "block_size", "decay_factor"), [(256, 128, 1.0), (1536, 128, 0.2), (384, 64, 0.5), (240, 16, 0.3)]
)
@pytest.mark.parametrize("num_frames", [6, 12, 21])
def test_cached_rows_are_the_last_rows_of_the_square(tokens, block_size, decay_factor, num_frames):
    policy = Radial(block_size=block_size, decay_factor=decay_factor, dense_current=False, distance="global")
    found = strip(policy, num_frames, (tokens // 16, 16), block_frames=3, num_sinks=1).block_mask[0]
    square = video_mask(num_frames, tokens, block_size=block_size, decay_factor=decay_factor)
    assert torch.equal(found, square[-found.shape[0] :])
    with_current = strip(replace(policy, dense_current=True), num_frames, (tokens // 16, 16), block_frames=3)
    own = 3 * tokens // block_size
    assert with_current.block_mask[0][:, -own:].all()
    assert torch.equal(with_current.block_mask[0][:, :-own], found[:, :-own])


def test_blocks_end_with_their_frame_in_the_cached_form():
    plan = strip(Radial(), 6, (30, 52), block_frames=3)
    assert plan.k_edges.diff().tolist() == ([128] * 12 + [24]) * 6
    assert plan.q_edges.diff().tolist() == ([128] * 12 + [24]) * 3
    # The short block counts as a whole one: its own place in other frames is read, and so are its queries.
    mask = strip(Radial(), 12, (30, 52), block_frames=3).block_mask[0]
    assert mask[12, 13 * 5 + 12] and mask.any(1).all()


def test_distance_is_that_of_positions_or_of_the_video():
    """A window that was moved up behind its sink: 0, 97..103 in the video, 0..7 to the model."""
    plain = make_geometry(8, (16, 16), block_frames=3)
    frames = [0, *range(97, 104)]
    segments = tuple(replace(s, frame=frame) for s, frame in zip(plain.segments, frames, strict=True))
    moved = replace(plain, segments=segments, query_frames=(101, 102, 103), block_index=33)
    policy = active(Radial(distance="position"))
    assert signature(policy.plan(None, None, moved)) == signature(policy.plan(None, None, plain))
    # A sink that is far away in the video is read whole all the same; without the role it would be thinned out.
    far = replace(moved, segments=(replace(segments[0], role="recent", frame=1, position=-88.0), *segments[1:]))
    assert not policy.plan(None, None, far).block_mask[0][:, :2].any()
    shifted = replace(moved, query_positions=(5.2, 6.2, 7.2))
    assert signature(policy.plan(None, None, shifted)) == signature(policy.plan(None, None, moved))


def test_what_has_no_places_in_a_frame_is_read_whole():
    geometry = make_geometry(40, (16, 16), block_frames=3)
    policy = active(Radial())
    assert not policy.plan(None, None, geometry).block_mask[0][:, 10:12].all()
    assert policy.plan(None, None, with_role(geometry, 5, "memory")).block_mask[0][:, 10:12].all()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    num_frames=st.integers(3, 14),
    columns=st.integers(1, 21),
    block_size=st.sampled_from([16, 32, 128]),
    thin_below=st.sampled_from([16, 128]),
    is_cached=st.booleans(),
    model=st.sampled_from(["wan", "hunyuan"]),
)
def test_every_query_reads_its_own_block(num_frames, columns, block_size, thin_below, is_cached, model):
    policy = Radial(block_size=block_size, thin_below=thin_below, model=model, dense_current=False)
    plan = strip(policy, num_frames, (10, columns), block_frames=3 if is_cached else None, num_sinks=0)
    mask = plan.validate().to_dense_mask()[0]
    first = mask.shape[1] - mask.shape[0]
    assert mask[torch.arange(len(mask)), torch.arange(first, mask.shape[1])].all()
    assert 0 < plan.density <= 1


def test_the_published_mask_is_the_plan_of_a_whole_video():
    geometry = AttentionGeometry.bidirectional(6, (30, 52))
    plan = active(Radial(decay_factor=0.2)).plan(None, None, geometry)
    assert torch.equal(plan.block_mask[0], video_mask(6, 1560, decay_factor=0.2))
    assert plan.uniform_block_sizes == (128, 128)
