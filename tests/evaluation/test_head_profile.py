"""The head profile against attention over everything, and the command that writes a head map."""

import pytest
import torch

from longtake.attention import sdpa
from longtake.cache import Geometry, KVCache, Pass
from longtake.cache.policies.forcing_kv import _find_head_map
from longtake.evaluation.head_profile import HeadProfile
from longtake.rope import axis_frequencies, rotate

SIZE, HEADS, CHANNELS = 4, 3, 16


def roll(profile, queries, keys, *, block=3):
    """Commit blocks of (frames * tokens, heads, channels) content, two videos alike."""
    num_frames = keys.shape[0] // SIZE
    geometry = Geometry(
        num_layers=1,
        num_heads=HEADS,
        head_dim=CHANNELS,
        num_rows=2,
        num_columns=2,
        frames_per_block=block,
        batch_size=2,
    )
    cache = KVCache(profile.policy, geometry, attention=sdpa)
    for index, start in enumerate(range(0, num_frames, block)):
        part = slice(start * SIZE, (start + block) * SIZE)
        q, k = (x[part].expand(2, -1, -1, -1) for x in (queries, keys))
        cache.attend(0, q, k, k, Pass("denoise", index, start, block))
        cache.attend(0, q, k, k, Pass("commit", index, start, block))


def content(num_frames):
    return torch.randn(2, num_frames * SIZE, HEADS, CHANNELS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", [1, 3, 4])
def test_shares_equal_those_of_full_attention(block):
    profile = HeadProfile()
    queries, keys = content(12)
    roll(profile, queries, keys, block=block)
    cells = torch.tensor([(n // SIZE, n % SIZE // 2, n % 2) for n in range(12 * SIZE)], dtype=torch.float64)
    q, k = (rotate(x[None], cells, frequencies=axis_frequencies(CHANNELS))[0].double() for x in (queries, keys))
    expected = []
    for start in range(0, 12, block):
        if start - 1 > 3:
            end = start + block
            scores = torch.einsum("qhd,khd->hqk", q[start * SIZE : end * SIZE], k[: end * SIZE]) / CHANNELS**0.5
            by_frame = scores.softmax(-1).mean(1).unflatten(-1, (end, SIZE)).sum(-1)
            expected.append(by_frame[:, start - 1 :].sum(-1) / by_frame[:, 3:].sum(-1))
    assert (profile.shares[0] - torch.stack(expected).mean(0)).abs().max() < 1e-6


def test_a_head_that_looks_everywhere_is_dynamic_and_one_that_looks_at_itself_is_static():
    queries, keys = content(12)
    queries[:, 0], queries[:, 1] = 0, 0
    keys[:, 1] = 0
    keys[:, 2], queries[:, 2] = 0, 0
    # The slowest temporal pair lets near frames stand out: a peak at no distance.
    keys[:, 2, :8], queries[:, 2, :8] = 20, 20
    profile = HeadProfile()
    roll(profile, queries, keys)
    even = torch.tensor([4 / 6, 4 / 9]).mean()  # blocks at 6 and 9: the last frame and three of the block
    assert torch.allclose(profile.shares[0, :2], even.double().expand(2), atol=1e-6)
    assert profile.shares[0, 2] > 0.9
    assert profile.head_map(0.8).static == ((2,),) and profile.head_map(0.1).static == ((0, 1, 2),)


def test_short_rollouts_are_refused():
    profile = HeadProfile()
    roll(profile, *content(3))
    with pytest.raises(ValueError, match="profile longer rollouts"):
        profile.head_map()


def test_the_command_writes_a_map_of_the_model(tmp_path):
    from longtake.scripts.console import run_app
    from longtake.scripts.main import app

    path = tmp_path / "heads.yaml"
    words = ["profile-heads", "mini", "--num-prompts", "1", "--seconds", "3", "--out", str(path)]
    assert run_app(app, words) == 0
    assert _find_head_map(str(path), 6, 6).num_heads == 6
    assert run_app(app, words) == 2, "nothing is written over"
    assert run_app(app, [*words[:-1], str(tmp_path / "other.yaml"), "--threshold", "2"]) == 2
