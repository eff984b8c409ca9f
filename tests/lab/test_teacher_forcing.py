"""The one-pass training forward equals a cached rollout of the same weights."""

from itertools import combinations

import pytest
import torch

from lab.mini.teacher_forcing import ContextLayout, TeacherForcingPlan, predict_flow, teacher_forcing
from longtake.attention import sdpa
from longtake.cache import KVCache, Pass, make_policy
from longtake.models import CausalTransformer, Prompt, Segment

BLOCKS, FRAMES, SIDE = 4, 2, 4
PLAN = {"frames_per_block": FRAMES, "rows": SIDE // 2, "columns": SIDE // 2}


@pytest.fixture
def transformer(make_transformer):
    return make_transformer(attention_head_dim=16, text_dim=8)


def _batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shape = (2, 4, BLOCKS * FRAMES, SIDE, SIDE)
    return {
        "clean": torch.randn(shape),
        "noisy": torch.randn(shape),
        "clean_timesteps": 100.0 * torch.rand(2, BLOCKS),
        "noisy_timesteps": 1000.0 * torch.rand(2, BLOCKS),
        "prompt_embeds": torch.randn(2, 3, 8),
    }


def _rollout(transformer, batch, policy) -> torch.Tensor:
    """Each block denoised, then committed, under the product's cache; one sample after the other."""
    causal = CausalTransformer(transformer)
    geometry = causal.geometry((4, SIDE, SIDE), frames_per_block=FRAMES)
    videos = []
    for row in range(2):
        cache, outputs = KVCache(make_policy(policy), geometry, attention=sdpa), []
        prompt = Prompt(batch["prompt_embeds"][row : row + 1])
        for index in range(BLOCKS):
            for name, kind in (("noisy", "denoise"), ("clean", "commit")):
                x = batch[name][row : row + 1].transpose(1, 2).split(FRAMES, dim=1)[index]
                time = batch[f"{name}_timesteps"][row, index].item()
                segments = [Segment(Pass(kind, index, index * FRAMES, FRAMES), time)]
                with causal.installed():
                    outputs.append(causal.flow(x, segments=segments, cache=cache, prompt=prompt))
        videos.append(torch.cat(outputs[::2], dim=1))
    return torch.cat(videos).transpose(1, 2)


def _sink(num_blocks, num_sink_blocks=0, positions="absolute"):
    frames = {"num_context_frames": num_blocks * FRAMES, "num_sink_frames": num_sink_blocks * FRAMES}
    return {"policy": "attention_sink", **frames, "positions": positions}


# What a training context is in a rollout, whose count of blocks has the one that is denoised.
LAYOUTS = [
    (ContextLayout(), "full"),
    (ContextLayout(num_window_blocks=2), _sink(3)),
    (ContextLayout(num_window_blocks=1, num_sink_blocks=1), _sink(3, 1)),
    (ContextLayout(num_window_blocks=1, num_sink_blocks=1, is_contiguous=True), _sink(3, 1, "contiguous")),
    (ContextLayout(num_window_blocks=0, num_sink_blocks=0), _sink(1)),
]


@torch.no_grad()
def _one_pass(transformer, batch, layout) -> torch.Tensor:
    plan = TeacherForcingPlan(num_blocks=BLOCKS, layout=layout, **PLAN)
    with teacher_forcing(transformer, plan):
        return predict_flow(transformer, plan, **batch)


@pytest.mark.parametrize(("layout", "policy"), LAYOUTS, ids=str)
def test_one_pass_equals_a_cached_rollout(transformer, layout, policy):
    difference = _one_pass(transformer, _batch(), layout) - _rollout(transformer, _batch(), policy)
    assert difference.abs().max() < 2e-5


def test_layouts_differ(transformer):
    outputs = [_one_pass(transformer, _batch(), layout) for layout, _ in LAYOUTS]
    assert all((left - right).abs().max() > 1e-4 for left, right in combinations(outputs, 2))


def test_noisy_blocks_do_not_leak(transformer):
    batch = _batch()
    before = _one_pass(transformer, batch, ContextLayout())
    batch["noisy"][:, :, :FRAMES] += 1.0
    batch["clean"][:, :, -FRAMES:] += 1.0
    after = _one_pass(transformer, batch, ContextLayout())
    changed = (after - before).abs().amax(dim=(0, 1, 3, 4))
    assert changed[:FRAMES].min() > 1e-3
    assert changed[FRAMES:].max() == 0.0


def test_transformer_is_restored_and_a_wrong_number_of_frames_refused(transformer):
    stock = [block.attn1.processor for block in transformer.blocks]
    plan = TeacherForcingPlan(num_blocks=BLOCKS + 1, **PLAN)
    with pytest.raises(ValueError, match="frames"), teacher_forcing(transformer, plan):
        predict_flow(transformer, plan, **_batch())
    assert [block.attn1.processor for block in transformer.blocks] == stock
    assert "forward" not in vars(transformer.condition_embedder)
    assert "forward" not in vars(transformer.blocks[0])
