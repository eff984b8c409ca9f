"""Rotation against diffusers' own table, and what must hold where the table ends."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.rope import GridRotary, apply_phases, axis_frequencies, rotate, token_phases

COMMON = settings(deadline=None, derandomize=True, max_examples=25)


def grid(frames, rows, columns):
    axes = [torch.as_tensor(axis, dtype=torch.float64) for axis in (frames, range(rows), range(columns))]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def diffusers_rotation(x, num_frames, rows, columns):
    cos, sin = WanRotaryPosEmbed(x.shape[-1], (1, 2, 2), 1024)(torch.zeros(1, 1, num_frames, 2 * rows, 2 * columns))
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2)


@pytest.mark.parametrize("head_dim", [12, 24, 32, 48, 64, 128])
def test_equals_diffusers_table(head_dim):
    x = torch.randn(2, 5 * 3 * 4, 2, head_dim, generator=torch.Generator().manual_seed(0))
    ours = rotate(x, grid(range(5), 3, 4), frequencies=axis_frequencies(head_dim))
    assert (ours - diffusers_rotation(x, 5, 3, 4)).abs().max() < 2e-6
    shifted = rotate(x, grid(range(1, 6), 3, 4), frequencies=axis_frequencies(head_dim))
    assert (shifted - diffusers_rotation(x, 5, 3, 4)).abs().max() > 0.1


@COMMON
@given(
    shift=st.floats(0, 1e6), distance=st.floats(0, 30), head_dim=st.sampled_from([24, 32, 128]), seed=st.integers(0, 9)
)
def test_only_distances_matter_at_any_position(shift, distance, head_dim, seed):
    q, k = torch.randn(2, 1, 1, 1, head_dim, generator=torch.Generator().manual_seed(seed))
    frequencies = axis_frequencies(head_dim)

    def score(start):
        at = [torch.tensor([[start + d, 2.0, 3.0]], dtype=torch.float64) for d in (distance, 0.0)]
        return (rotate(q, at[0], frequencies=frequencies) * rotate(k, at[1], frequencies=frequencies)).sum()

    assert torch.isclose(score(0.0), score(shift), atol=2e-4)


@COMMON
@given(position=st.floats(0, 1e5), seed=st.integers(0, 9))
def test_bfloat16_keys_rotated_on_read_stay_within_rounding(position, seed):
    k = torch.randn(1, 1, 4, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
    at = torch.tensor([[position, 1.0, 2.0]], dtype=torch.float64)
    ours = rotate(k, at, frequencies=axis_frequencies(128)).double()
    axes = vars(axis_frequencies(128)).values()
    assert [2 * len(axis) for axis in axes] == [44, 42, 42], "Wan's split"
    angles = torch.cat(
        [place * torch.tensor(axis, dtype=torch.float64) for place, axis in zip(at[0], axes, strict=True)]
    )
    pairs = torch.view_as_complex(k.double().unflatten(-1, (-1, 2)).contiguous())
    exact = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    assert (ours - exact).norm() / exact.norm() < 2e-3


def test_repeated_in_place_rotation_is_the_wrong_way():
    """As in the released code of Deep Forcing, in bfloat16: the error that storage without rotation avoids."""
    k = torch.randn(1, 1, 4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    frequencies = axis_frequencies(128)
    step = token_phases(torch.tensor([[3.0, 0.0, 0.0]]), frequencies=frequencies)
    moved = k.clone()
    for _ in range(400):
        moved = apply_phases(moved, step)
    direct = apply_phases(k, token_phases(torch.tensor([[1200.0, 0.0, 0.0]]), frequencies=frequencies)).float()
    assert (moved.float() - direct).norm() / direct.norm() > 0.02


@pytest.mark.parametrize("positions", [(0.0, 1.0, 2.0), (1023.0, 1024.0, 10_000.0), (0.5, 2.25)])
def test_frame_phases_equal_token_phases(positions):
    frequencies = axis_frequencies(32)
    rotary = GridRotary(frequencies, num_rows=3, num_columns=4, device=torch.device("cpu"))
    expected = token_phases(grid(positions, 3, 4), frequencies=frequencies)
    assert torch.equal(rotary.frames(positions), expected)
    assert rotary.frames(positions) is rotary.frames(positions)


def test_writes_into_a_slice_of_a_larger_buffer():
    x = torch.randn(2, 6, 2, 24, generator=torch.Generator().manual_seed(0))
    phases = token_phases(grid(range(2), 1, 3), frequencies=axis_frequencies(24))
    for dtype in (torch.float32, torch.bfloat16):
        buffer = torch.zeros(2, 10, 2, 24, dtype=dtype)
        apply_phases(x.to(dtype), phases, out=buffer[:, 2:8])
        assert torch.equal(buffer[:, 2:8], apply_phases(x.to(dtype), phases))
        assert not buffer[:, :2].any() and not buffer[:, 8:].any()


def test_bad_input():
    with pytest.raises(ValueError, match="head_dim=5"):
        axis_frequencies(5)
    with pytest.raises(ValueError, match="does not match"):
        rotate(torch.zeros(1, 1, 1, 16), torch.zeros(1, 3), frequencies=axis_frequencies(24))
    rotary = GridRotary(axis_frequencies(24), num_rows=1, num_columns=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="finite"):
        rotary.frames((float("nan"),))
