"""The policy of docs/adding_a_policy.md: file, name and row are enough for the shared matrix and a rollout."""

import re
import sys
from pathlib import Path
from types import ModuleType

import policy_rows
import pytest
import torch
from golden_cases import FRAME_SHAPE, TEXT_SHAPE, seeded, tiny_transformer
from policy_checks import CHECKS, WRAPPERS

from longtake.cache import POLICIES
from longtake.pipelines import rollout_latents
from longtake.samplers import SeededNoise

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding_a_policy.md"
TEXT = PAGE.read_text(encoding="utf-8")
CODE, ROW = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def every_kth(monkeypatch):
    """The page's module, where its registry line says that it lies."""
    name, place, cls = re.search(r'`"(\w+)": "([\w.]+):(\w+)",`', TEXT).groups()
    module = ModuleType(f"longtake.{place}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(CODE, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(POLICIES, name, module.__dict__[cls])
    return POLICIES[name]


@pytest.fixture
def row(every_kth):
    (row,) = eval("{" + ROW + "}", {"Row": policy_rows.Row}).values()
    return row


def test_the_page_is_short():
    assert len(TEXT.splitlines()) <= 60


@pytest.mark.parametrize("wrapper", ["plain", "offloaded"])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("check", CHECKS)
def test_the_row_holds(row, check, block, wrapper):
    CHECKS[check](row, block, WRAPPERS[wrapper])


def test_bad_settings_are_refused(every_kth):
    with pytest.raises(ValueError, match="k=0 must be 1 or more"):
        every_kth(k=0).check(3)


def test_a_rollout_takes_it_without_knowing_it(every_kth):
    transformer, prompt_embeds = tiny_transformer(), seeded("prompt", TEXT_SHAPE)
    settings = {"num_frames": 12, "frame_shape": FRAME_SHAPE, "noise": SeededNoise([0, 1])}
    videos = [
        torch.cat([b.latents for b in rollout_latents(transformer, prompt_embeds, cache=cache, **settings)], dim=1)
        for cache in ("full", {"policy": "every_kth", "k": 2})
    ]
    difference = (videos[0] - videos[1]).abs().amax(dim=(0, 2, 3, 4))
    assert (difference[:3] == 0).all() and (difference[3:] > 1e-4).all()
