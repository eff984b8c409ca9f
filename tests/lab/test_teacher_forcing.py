"""The one-pass training forward equals a cached block-by-block rollout of the same weights."""

from itertools import combinations

import pytest
import torch

from lab.mini.teacher_forcing import (
    ContextLayout,
    TeacherForcingPlan,
    predict_flow,
    rotary_tables,
    rotate_pairs,
    teacher_forcing,
)

BLOCKS, FRAMES, SIDE = 4, 2, 4


PLAN = {"frames_per_block": FRAMES, "rows": SIDE // 2, "columns": SIDE // 2}


@pytest.fixture
def transformer(make_transformer):
    return make_transformer(attention_head_dim=16, text_dim=8).double()


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 4, BLOCKS * FRAMES, SIDE, SIDE)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {
        "clean": draw(*shape),
        "noisy": draw(*shape),
        "clean_timesteps": 100.0 * torch.rand(2, BLOCKS, generator=generator, dtype=torch.float64),
        "noisy_timesteps": 1000.0 * torch.rand(2, BLOCKS, generator=generator, dtype=torch.float64),
        "prompt_embeds": draw(2, 3, 8),
    }


class _CachedProcessor:
    """The obvious rollout: a list of un-rotated keys and values per block, rotated when read."""

    def __init__(self, layout: ContextLayout) -> None:
        self.layout, self.stored, self.block = layout, [], 0
        self.is_commit = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads)
        value = attn.to_v(hidden_states).unflatten(2, heads)

        def turn(x, block):
            frames = torch.arange(FRAMES) + block * FRAMES
            tables = rotary_tables(frames, rows=SIDE // 2, columns=SIDE // 2, head_dim=x.shape[-1])
            return rotate_pairs(x, *tables)

        visible = self.layout.visible(self.block)
        shift = self.layout.shift(self.block)
        places = [b + shift if b < self.layout.num_sink_blocks and b in visible and shift else b for b in visible]
        keys = [turn(self.stored[b][0], place) for b, place in zip(visible, places, strict=True)]
        keys = torch.cat([*keys, turn(key, self.block)], dim=1).transpose(1, 2)
        values = torch.cat([*(self.stored[b][1] for b in visible), value], dim=1).transpose(1, 2)
        query = turn(query, self.block).transpose(1, 2)
        weights = torch.softmax(query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1)
        if self.is_commit:
            self.stored.append((key, value))
        return attn.to_out[0]((weights @ values).transpose(1, 2).flatten(2))


def _rollout(transformer, batch, layout) -> torch.Tensor:
    processors = [_CachedProcessor(layout) for _ in transformer.blocks]
    for block, processor in zip(transformer.blocks, processors, strict=True):
        block.attn1.set_processor(processor)
    outputs = []
    tokens = FRAMES * (SIDE // 2) ** 2
    for index in range(BLOCKS):
        part = slice(index * FRAMES, (index + 1) * FRAMES)
        for name, is_commit in (("noisy", False), ("clean", True)):
            for processor in processors:
                processor.block, processor.is_commit = index, is_commit
            timestep = batch[f"{name}_timesteps"][:, index : index + 1].expand(-1, tokens)
            output = transformer(batch[name][:, :, part], timestep, batch["prompt_embeds"], return_dict=False)[0]
            if name == "noisy":
                outputs.append(output)
    return torch.cat(outputs, dim=2)


LAYOUTS = [
    ContextLayout(),
    ContextLayout(num_window_blocks=2),
    ContextLayout(num_window_blocks=1, num_sink_blocks=1),
    ContextLayout(num_window_blocks=1, num_sink_blocks=1, is_contiguous=True),
    ContextLayout(num_window_blocks=0, num_sink_blocks=0),
]


@torch.no_grad()
def _one_pass(transformer, batch, layout) -> torch.Tensor:
    plan = TeacherForcingPlan(num_blocks=BLOCKS, layout=layout, **PLAN)
    with teacher_forcing(transformer, plan):
        return predict_flow(transformer, plan, **batch)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_pass_equals_cached_rollout(transformer, layout):
    batch = _batch()
    one_pass = _one_pass(transformer, batch, layout)
    with torch.no_grad():
        reference = _rollout(transformer, batch, layout)
    # Timestep embeddings and tables are float32 in both, everything else float64.
    assert torch.allclose(one_pass, reference, atol=2e-6), (one_pass - reference).abs().max()


def test_layouts_differ(transformer):
    outputs = [_one_pass(transformer, _batch(), layout) for layout in LAYOUTS]
    assert all((left - right).abs().max() > 1e-4 for left, right in combinations(outputs, 2))


def test_tables_equal_diffusers(transformer):
    cosines, sines = transformer.float().rope(torch.zeros(1, 4, 9, SIDE, SIDE))
    ours = rotary_tables(torch.arange(9), rows=SIDE // 2, columns=SIDE // 2, head_dim=16)
    assert torch.allclose(ours[0], cosines[0, :, 0, 0::2], atol=1e-6)
    assert torch.allclose(ours[1], sines[0, :, 0, 1::2], atol=1e-6)


def test_noisy_blocks_do_not_leak(transformer):
    batch = _batch()
    before = _one_pass(transformer, batch, ContextLayout())
    batch["noisy"][:, :, :FRAMES] += 1.0
    batch["clean"][:, :, -FRAMES:] += 1.0
    after = _one_pass(transformer, batch, ContextLayout())
    changed = (after - before).abs().amax(dim=(0, 1, 3, 4))
    assert changed[:FRAMES].min() > 1e-3
    assert changed[FRAMES:].max() == 0.0


def test_transformer_is_restored(transformer):
    stock = [block.attn1.processor for block in transformer.blocks]
    plan = TeacherForcingPlan(num_blocks=BLOCKS, **PLAN)
    with pytest.raises(RuntimeError), teacher_forcing(transformer, plan):
        raise RuntimeError
    assert [block.attn1.processor for block in transformer.blocks] == stock
    assert "forward" not in vars(transformer.condition_embedder)
    assert "forward" not in vars(transformer.blocks[0])


def test_wrong_number_of_frames_is_refused(transformer):
    plan = TeacherForcingPlan(num_blocks=BLOCKS + 1, **PLAN)
    with teacher_forcing(transformer, plan), pytest.raises(ValueError, match="frames"):
        predict_flow(transformer, plan, **_batch())
