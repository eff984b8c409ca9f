"""Sparse attention in the cached rollout: what policies are told, backends against each other, what is refused."""

import re

import pytest
import torch

from longtake.attention import BackendUnavailable
from longtake.cache import POLICIES, Call, Geometry, Pass, Run
from longtake.models.sparse_attention import AttentionSetting, SparseSelfAttention
from longtake.pipelines import LatentRollout, RolloutSettings
from longtake.pipelines import settings as pipeline_settings
from longtake.samplers import SeededNoise

FRAME_SHAPE = (4, 8, 8)  # 4 x 4 tokens
RADIAL = {"policy": "radial", "block_size": 4, "thin_below": 8}
HEADS = {"policy": "forcing_kv", "heads": [[0], [1]], "num_plain_layers": 0}
WRAPPERS = {"quantized", "offloaded", "commit_reads", "budget"}
WHOLE = ({"policy": "pack", "compressor": "none"}, {"policy": "deep_forcing", "compression": "none"})
SPARSE = {"dense_blocks": 1, "dense_layers": 0, "dense_steps": 0}


@pytest.fixture(scope="module")
def model(make_transformer):
    transformer = make_transformer()
    return transformer, torch.randn(2, 5, transformer.config.text_dim)


def rollout(model, attention, *, frames=21, **settings):
    transformer, prompt = model
    settings = {
        "cache": {"policy": "attention_sink", "num_context_frames": 12, "num_sink_frames": 3},
        "sampler": {"name": "few_step", "timesteps": [1000, 500]},
        "noise": SeededNoise([0, 1]),
    } | settings
    return LatentRollout(
        transformer, prompt, num_frames=frames, frame_shape=FRAME_SHAPE, attention=attention, **settings
    )


def roll(model, attention, **settings):
    return torch.cat([block.latents for block in rollout(model, attention, **settings)], dim=1)


def test_a_plan_that_leaves_nothing_out_is_dense_attention(model):
    dense = roll(model, "dense")
    assert torch.equal(dense, roll(model, {"policy": "dense"}))
    whole = roll(model, {"policy": "window", "num_window_frames": 100, **SPARSE, "commit_pass": "sparse"})
    assert (whole - dense).abs().max() < 1e-5


@pytest.mark.parametrize("commit_pass", ["dense", "sparse"])
def test_two_backends_agree_and_differ_from_dense_where_they_may(model, commit_pass):
    settings = {**RADIAL, **SPARSE, "commit_pass": commit_pass}
    gathered, masked = (roll(model, {**settings, "backend": name}) for name in ("gather_sdpa", "sdpa_masked"))
    dense = roll(model, "dense")
    assert (gathered - masked).abs().max() < 1e-4
    change = (gathered - dense).abs().amax(dim=(0, 2, 3, 4))
    assert (change[:3] == 0).all(), "the first block is dense"
    assert (change[6:] > 1e-3).any()


def test_all_that_a_policy_is_told(model):
    """A whole frame is a segment, chosen tokens and averages are memory that is read whole, the block comes last."""
    seen = []

    class Spy:
        def __init__(self, inner):
            self.inner, self.is_static, self.name = inner, inner.is_static, inner.name

        def plan(self, q, k, geometry, **options):
            seen.append(geometry)
            return self.inner.plan(q, k, geometry, **options)

    setting = AttentionSetting(RADIAL | SPARSE)
    shapes = Geometry(num_layers=1, num_heads=2, head_dim=12, num_rows=2, num_columns=2, frames_per_block=3)
    attend = SparseSelfAttention(setting, shapes, num_steps=4, meter=Spy(setting.policy))
    runs = (
        Run(8, (0, 1), (0.0, 1.0), "sink"),
        Run(5, (2, 3, 4), (), "mid"),
        Run(4, (), (6.5,), "memory"),
        Run(4, (8,), (7.0,), "recent"),
    )
    call = Call(0, Pass("denoise", 3, 9, 3, step_index=2), runs, (8.0, 9.0, 10.0))
    q, k, v = torch.randn(1, 12, 2, 12), *torch.randn(2, 1, 33, 2, 12).unbind(0)
    assert attend(q, k, v, call, None).shape == q.shape
    (geometry,) = seen
    rows = [(s.frame, s.position, s.start, s.length, s.role) for s in geometry.segments]
    assert rows == [
        (0, 0.0, 0, 4, "sink"),
        (1, 1.0, 4, 4, "sink"),
        (-1, 0.0, 8, 5, "memory"),
        (-1, 6.5, 13, 4, "memory"),
        (8, 7.0, 17, 4, "recent"),
        (9, 8.0, 21, 4, "current"),
        (10, 9.0, 25, 4, "current"),
        (11, 10.0, 29, 4, "current"),
    ]
    assert (geometry.block_index, geometry.step_index, geometry.num_steps, geometry.kind) == (3, 2, 4, "denoise")


@pytest.mark.parametrize(
    ("cache", "attention"),
    [
        ("deep_forcing", "radial"),
        ("memrope", "light_forcing"),
        ("pack", "radial"),
        ("rolling_sink", "window"),
        (HEADS, "radial"),
        ({"policy": "quantized", "inner": "sliding_window"}, "svg2"),
        ("sliding_window", "svg"),
        ("attention_sink", "sliding_tile"),
    ],
)
def test_every_kind_of_cache_takes_a_mask(model, cache, attention):
    settings = {"policy": attention, **SPARSE} | ({"block_size": 4} if attention == "radial" else {})
    video = roll(model, settings, frames=30, cache=cache)
    assert video.isfinite().all() and video.shape[1] == 30


@pytest.mark.parametrize("cache", [*sorted(POLICIES.keys() - WRAPPERS), *WHOLE], ids=str)
def test_frames_that_a_cache_breaks_are_refused_before_any_work(model, cache, monkeypatch):
    """An attention policy without a place for them runs to the end, or does not begin."""
    settings = {"policy": "svg", **SPARSE, "block_size": 16}
    if cache == "forcing_kv":
        cache = HEADS
    try:
        RolloutSettings(cache=cache, attention=settings)
    except ValueError as error:
        refusal = error
    else:
        assert roll(model, settings, frames=36, cache=cache).isfinite().all()
        return
    assert cache not in WHOLE and re.search("no whole frames|weights its tokens|gives heads different", str(refusal))
    # Not refused for nothing: it would have failed in the middle.
    monkeypatch.setattr(pipeline_settings, "_check_attention", lambda *_: None)
    with pytest.raises(ValueError, match="whole frames|weights its tokens|gives heads different"):
        roll(model, settings, frames=36, cache=cache)


def test_a_saved_rollout_continues_with_the_same_plans(model):
    options = {"frames": 18, "cache": {"policy": "sliding_window", "num_context_frames": 9}}
    whole, again = (rollout(model, {"policy": "svg2", **SPARSE}, **options) for _ in range(2))
    for _ in range(3):
        whole.next_block()
    again.load_state_dict(*whole.state_dict())
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(again, whole, strict=True))
    assert 0.0 < whole.attention_density < 1.0


def test_a_commit_pass_beside_the_next_blocks_first_step_takes_no_memory_away():
    """A merged forward goes layer by layer through the commit pass of a block and the first step of the next."""
    seen = []

    class Remembering:
        is_static, name = True, "remembering"

        def plan(self, q, k, geometry, *, v, memory):
            memory["calls"] = memory.get("calls", 0) + 1
            seen.append((geometry.kind, geometry.block_index, geometry.layer, geometry.step_index, memory["calls"]))

    shapes = Geometry(num_layers=2, num_heads=2, head_dim=12, num_rows=2, num_columns=2, frames_per_block=1)
    attend = SparseSelfAttention(AttentionSetting(RADIAL), shapes, num_steps=2, meter=Remembering())
    q = torch.randn(1, 4, 2, 12)

    def call(kind, block, layer, step=0):
        attend(q, q, q, Call(layer, Pass(kind, block, block, 1, step_index=step), (), (0.0,)), None)

    for block in (1, 2):
        for layer in range(2):
            call("commit", block - 1, layer)
            call("denoise", block, layer)
        for layer in range(2):
            call("denoise", block, layer, step=1)
    denoised = [row for row in seen if row[0] == "denoise"]
    assert denoised == [("denoise", b, layer, step, step + 1) for b in (1, 2) for step in (0, 1) for layer in (0, 1)]
    assert {row[-1] for row in seen if row[0] == "commit"} == {1}


def test_density_counts_what_was_computed(model):
    densities = []
    for attention in ("dense", {**RADIAL, **SPARSE}, {**RADIAL, **SPARSE, "commit_pass": "sparse"}):
        video = rollout(model, attention, frames=15)
        assert len(list(video)) == 5
        densities.append(video.attention_density)
    assert densities[0] == 1.0 > densities[1] > densities[2] > 0.1


@pytest.mark.parametrize(
    ("attention", "cache", "message"),
    [
        ("radial", {"policy": "offloaded", "inner": "tempcache"}, "weights its tokens"),
        ("radal", "full", "Did you mean 'radial'"),
        ({"policy": "radial", "blok_size": 4}, "full", "block_size"),
        ({"policy": "svg", **SPARSE}, HEADS, "gives heads different tokens"),
        ({**RADIAL, **SPARSE, "backend": "flash"}, "full", "flash"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(model, attention, cache, message):
    with pytest.raises((ValueError, BackendUnavailable), match=message):
        roll(model, attention, cache=cache)
