"""What docs/adding_a_policy.md shows is what the repository holds, and the state it writes out runs."""

import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden_cases import FRAME_SHAPE, TEXT_SHAPE, seeded, tiny_transformer

from longtake.attention import sdpa
from longtake.cache import POLICIES, CachePolicy, Geometry, KVCache, Pass, make_policy
from longtake.pipelines import rollout_latents
from longtake.samplers import SeededNoise

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adding_a_policy.md"
GEOMETRY = {"num_layers": 2, "num_heads": 2, "head_dim": 12, "num_rows": 2, "num_columns": 3}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _load(code: str, name: str) -> dict[str, object]:
    module = ModuleType(name)
    exec(compile(code, f"{PAGE.name}:{name}", "exec"), module.__dict__)
    return module.__dict__


@pytest.fixture
def no_memory(monkeypatch) -> type[CachePolicy]:
    monkeypatch.setitem(POLICIES, "no_memory", _load(_blocks("python")[4], "no_memory")["NoMemory"])
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


@pytest.mark.parametrize(
    ("language", "index", "path"),
    [
        ("python", 0, "cache/policies/dilated_window.py"),
        ("yaml", 0, "configs/cache/dilated_window.yaml"),
        ("python", 1, "tests/support/policy_rows.py"),
        ("python", 2, "tests/reference/frame_memories.py"),
        ("python", 3, "tests/cache/test_frame_memories.py"),
    ],
)
def test_page_shows_what_the_repository_holds(language, index, path):
    assert _blocks(language)[index].strip() in (ROOT / path).read_text(encoding="utf-8")


def test_page_names_the_commit_and_its_files():
    text = PAGE.read_text(encoding="utf-8")
    (commit,) = set(re.findall(r"[Cc]ommit `([0-9a-f]{7,})`", text))
    rows = re.findall(r"^\| (`[^|]+) \| (\d+) \|", text, re.MULTILINE)
    lines = {tuple(re.findall(r"`([^`]+)`", names)): int(count) for names, count in rows}
    shown = subprocess.run(
        ["git", "show", "--numstat", "--format=", commit], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if shown.returncode != 0:
        pytest.skip(f"no history here to look {commit} up in: {shown.stderr.strip()}")
    added = {path: count for count, _, path in (line.split("\t") for line in shown.stdout.splitlines())}
    for paths, count in lines.items():
        assert sum(int(added[path]) for path in paths if added[path] != "-") == count, paths


def test_no_memory_forgets(no_memory):
    cache = _cache(make_policy("no_memory"))
    outputs = _roll(cache, range(4))
    alone = _roll(_cache(no_memory()), range(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(outputs[6:], alone, strict=True))
    assert cache.stats().num_bytes == 0 and cache.state_dict() == {}


def test_rollout_takes_it_without_knowing_it(no_memory):
    transformer, prompt_embeds = tiny_transformer(), seeded("prompt", TEXT_SHAPE)
    settings = {"num_frames": 12, "frame_shape": FRAME_SHAPE, "noise": SeededNoise([0, 1])}
    videos = [
        torch.cat([b.latents for b in rollout_latents(transformer, prompt_embeds, cache=name, **settings)], dim=1)
        for name in ("full", "no_memory")
    ]
    difference = (videos[0] - videos[1]).abs().amax(dim=(0, 2, 3, 4))
    assert (difference[:3] == 0).all() and (difference[3:] > 1e-4).all()
