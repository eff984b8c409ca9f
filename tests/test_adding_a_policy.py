"""The policies written out in docs/adding_a_policy.md, taken from the page and run as a user would add them."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from longtake.attention import sdpa
from longtake.cache import POLICIES, CachePolicy, Geometry, KVCache, Pass, make_policy
from longtake.pipelines import rollout_latents
from longtake.samplers import SeededNoise
from longtake.scripts.golden import FRAME_SHAPE, TEXT_SHAPE, seeded, tiny_transformer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding_a_policy.md"
GEOMETRY = {"num_layers": 2, "num_heads": 2, "head_dim": 12, "num_rows": 2, "num_columns": 3}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _load(code: str, name: str) -> dict[str, object]:
    module = ModuleType(name)
    exec(compile(code, f"{PAGE.name}:{name}", "exec"), module.__dict__)
    return module.__dict__


@pytest.fixture
def keyframes(monkeypatch) -> type[CachePolicy]:
    monkeypatch.setitem(POLICIES, "keyframes", _load(_blocks("python")[0], "keyframes")["Keyframes"])
    return POLICIES["keyframes"]


@pytest.fixture
def no_memory(monkeypatch) -> type[CachePolicy]:
    monkeypatch.setitem(POLICIES, "no_memory", _load(_blocks("python")[1], "no_memory")["NoMemory"])
    return POLICIES["no_memory"]


def _roll(cache: KVCache, blocks: range, *, size: int = 3) -> list[torch.Tensor]:
    """Attention outputs of each block's commit pass, from keys and values that depend on the block alone."""
    outputs = []
    for block in blocks:
        generator = torch.Generator().manual_seed(block)
        pass_ = Pass("commit", block, block * size, size)
        for layer in range(GEOMETRY["num_layers"]):
            q, k, v = torch.randn(3, 1, size * 6, 2, 12, generator=generator)
            cache.attend(layer, q, k, v, Pass("denoise", block, block * size, size))
            outputs.append(cache.attend(layer, q, k, v, pass_).clone())
    return outputs


def _cache(policy: CachePolicy, *, size: int = 3) -> KVCache:
    return KVCache(policy, Geometry(**GEOMETRY, frames_per_block=size), attention=sdpa)


def test_page_has_the_two_policies_and_the_preset():
    assert len(_blocks("python")) == 2 and len(_blocks("yaml")) == 1


def test_preset_makes_the_policy(keyframes):
    policy = make_policy(yaml.safe_load(_blocks("yaml")[0]))
    assert policy == keyframes(num_context_frames=12, num_key_frames=3, stride=8)
    assert policy.settings() == yaml.safe_load(_blocks("yaml")[0])
    with pytest.raises(ValueError, match="stride"):
        make_policy({"policy": "keyframes", "strid": 4})
    with pytest.raises(ValueError, match="use 6 or more"):
        keyframes(num_context_frames=5).check(3)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_keyframes_reads_the_window_and_every_eighth_frame(keyframes, size):
    """1,000 blocks of the plan alone: budget, order, and what a slow list comprehension over all frames says."""
    policy = keyframes()
    stored: tuple[int, ...] = ()
    for block in range(1000):
        start = block * size
        plan = policy.plan(stored, start, size)
        assert len(plan.frames) + size <= 12 and len(plan.frames) <= policy.num_stored_frames(size)
        assert list(plan.frames) == sorted(set(plan.frames))
        if start + size > 12:
            window = range(start - (12 - size - 3), start)
            keys = [frame for frame in range(window.start) if frame % 8 == 0][-3:]
            assert plan.frames == (*keys, *window)
        assert plan.positions + plan.query_positions == tuple(map(float, range(len(plan.frames) + size)))
        stored = (*plan.frames, *range(start, start + size))


def test_keyframes_equals_full_until_something_is_evicted(keyframes):
    ours = _roll(_cache(keyframes()), range(5))
    full = _roll(_cache(make_policy("full")), range(5))
    for index, (a, b) in enumerate(zip(ours, full, strict=True)):
        assert torch.allclose(a, b, atol=1e-5) is (index < 2 * 4), index  # 4 blocks of 3 fit into 12


def test_keyframes_continues_from_a_saved_state(keyframes):
    whole = _cache(keyframes())
    expected = _roll(whole, range(9))
    first, second = _cache(keyframes()), _cache(keyframes())
    _roll(first, range(6))
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(_roll(second, range(6, 9)), expected[12:], strict=True))
    assert second.stats() == whole.stats()
    assert second.stats().num_tokens == 9 * 6


def test_no_memory_forgets(no_memory):
    cache = _cache(make_policy("no_memory"))
    outputs = _roll(cache, range(4))
    alone = _roll(_cache(no_memory()), range(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(outputs[6:], alone, strict=True))
    assert cache.stats().num_bytes == 0 and cache.state_dict() == {}


def test_rollout_takes_them_without_knowing_them(keyframes, no_memory):
    transformer, prompt_embeds = tiny_transformer(), seeded("prompt", TEXT_SHAPE)
    settings = {"num_frames": 18, "frame_shape": FRAME_SHAPE, "noise": SeededNoise([0, 1])}
    videos = {
        name: torch.cat(
            [b.latents for b in rollout_latents(transformer, prompt_embeds, cache=name, **settings)], dim=1
        )
        for name in ("full", "keyframes", "no_memory")
    }
    assert all(video.shape == (2, 18, *FRAME_SHAPE) and video.isfinite().all() for video in videos.values())
    first_difference = {  # full reads all four blocks before frame 12, key frames drop some from there on
        name: int((videos[name] - videos["full"]).abs().amax(dim=(0, 2, 3, 4)).gt(1e-4).nonzero()[0])
        for name in ("keyframes", "no_memory")
    }
    assert first_difference == {"keyframes": 12, "no_memory": 3}
