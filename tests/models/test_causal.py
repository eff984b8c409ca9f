"""Block by block with a cache equals one masked pass of the stock transformer."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from longtake.attention import sdpa
from longtake.cache import KVCache, Pass, make_policy
from longtake.models import CausalTransformer, Prompt, Segment

_spec = importlib.util.spec_from_file_location(
    "block_causal", Path(__file__).parents[1] / "reference" / "block_causal.py"
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

SHAPE = (4, 6, 4)


@pytest.fixture(scope="module")
def transformer(make_transformer):
    return make_transformer(num_layers=3)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 12, *SHAPE, generator=generator), torch.randn(2, 7, 16, generator=generator)


def cached_flow(transformer, x, embeds, *, block, policy, timestep=0.0, merge=False, dtype=None):
    """Commit all blocks one after the other and return what each forward predicted."""
    causal = CausalTransformer(transformer)
    geometry = causal.geometry(SHAPE, frames_per_block=block, batch_size=x.shape[0])
    cache, prompt, out = KVCache(make_policy(policy), geometry, attention=sdpa), Prompt(embeds), []

    def segment(kind, start):
        return Segment(Pass(kind, start // block, start, block), timestep)

    with causal.installed():
        for start in range(0, x.shape[1], block):
            segments = [segment("commit", start)]
            if merge:  # the commit of a block and the first denoising pass of the next, in one forward
                segments = [segment("commit", start - block)] * (start > 0) + [segment("denoise", start)]
            part = x[:, start + block - block * len(segments) : start + block]
            flow = causal.flow(part, segments=segments, cache=cache, prompt=prompt)
            out.append(flow[:, -block:])
    return torch.cat(out, 1)


def window(block, frames, sinks=0):
    """Frame -> frames it may attend to under a window with sinks."""

    def reads(frame):
        start = frame // block * block
        own = range(start, start + block)
        first = max(0, start + block - (frames - min(sinks, start)))
        return [*range(min(sinks, start)), *range(first, start), *own]

    return reads


@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("merge", [False, True])
def test_full_equals_one_block_causal_pass(transformer, inputs, block, merge):
    x, embeds = inputs
    mask = reference.frame_mask(12, lambda f: range(f // block * block + block))
    expected = reference.masked_flow(transformer, x, timesteps=[0.0] * 12, prompt_embeds=embeds, mask=mask)
    ours = cached_flow(transformer, x, embeds, block=block, policy="full", merge=merge)
    assert (ours - expected).abs().max() < 2e-5
    wrong = reference.frame_mask(12, lambda f: range(12))
    wrong = reference.masked_flow(transformer, x, timesteps=[0.0] * 12, prompt_embeds=embeds, mask=wrong)
    assert (ours - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(("frames", "sinks"), [(6, 0), (6, 2), (9, 3), (4, 1)])
def test_windows_equal_one_masked_pass(block, frames, sinks):
    """One layer: with more, a window sees further back through the layer below, in both versions alike."""
    torch.manual_seed(2)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
    ).eval()
    generator = torch.Generator().manual_seed(3)
    x, embeds = torch.randn(1, 12, *SHAPE, generator=generator), torch.randn(1, 7, 16, generator=generator)
    policy = {"policy": "attention_sink", "num_context_frames": frames, "num_sink_frames": sinks}
    ours = cached_flow(model, x, embeds, block=block, policy=policy | {"positions": "absolute"})

    def expected(reads):
        mask = reference.frame_mask(12, reads)
        return reference.masked_flow(model, x, timesteps=[0.0] * 12, prompt_embeds=embeds, mask=mask)

    assert (ours - expected(window(block, frames, sinks))).abs().max() < 2e-5
    assert (ours - expected(window(block, frames + 1, sinks))).abs().max() > 1e-4


def test_per_frame_timesteps_in_one_forward(transformer, inputs):
    x, embeds = inputs
    causal = CausalTransformer(transformer)
    cache = KVCache(make_policy("full"), causal.geometry(SHAPE, frames_per_block=3, batch_size=2), attention=sdpa)
    segments = [Segment(Pass("commit", 0, 0, 3), 0.0), Segment(Pass("denoise", 1, 3, 3), 937.5)]
    with causal.installed():
        ours = causal.flow(x[:, :6], segments=segments, cache=cache, prompt=Prompt(embeds))
    mask = reference.frame_mask(6, lambda f: range(f // 3 * 3 + 3))
    steps = [0.0] * 3 + [937.5] * 3
    expected = reference.masked_flow(transformer, x[:, :6], timesteps=steps, prompt_embeds=embeds, mask=mask)
    assert (ours - expected).abs().max() < 2e-5


def test_denoising_never_changes_storage(transformer, inputs):
    x, embeds = inputs
    causal = CausalTransformer(transformer)
    cache = KVCache(make_policy("full"), causal.geometry(SHAPE, frames_per_block=3, batch_size=2), attention=sdpa)
    with causal.installed():
        for segment in (Segment(Pass("commit", 0, 0, 3), 0.0), Segment(Pass("denoise", 1, 3, 3), 500.0)):
            before = {k: v.clone() if torch.is_tensor(v) else v for k, v in cache.state_dict().items()}
            start = segment.pass_.start_frame
            causal.flow(x[:, start : start + 3], segments=[segment], cache=cache, prompt=Prompt(embeds))
    after = cache.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(v, after[k]) for k, v in before.items() if torch.is_tensor(v)
    )


def test_installs_and_removes_itself_even_after_an_error(transformer, inputs):
    x, embeds = inputs
    processors = [b.attn1.processor for b in transformer.blocks] + [b.attn2.processor for b in transformer.blocks]
    arguments = (x.transpose(1, 2), torch.tensor([5.0, 7.0]), embeds)
    with torch.no_grad():
        before = transformer(*arguments).sample
        causal = CausalTransformer(transformer)
        with pytest.raises(RuntimeError, match="CausalTransformer.flow"), causal.installed():
            transformer(*arguments)
        assert torch.equal(transformer(*arguments).sample, before)
    now = [b.attn1.processor for b in transformer.blocks] + [b.attn2.processor for b in transformer.blocks]
    assert all(a is b for a, b in zip(processors, now, strict=True))


def test_fused_projections_give_the_same(inputs):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=64,
        num_layers=2,
    ).eval()
    x, embeds = inputs
    plain = cached_flow(model, x, embeds, block=3, policy="full")
    model.fuse_qkv_projections()
    assert (cached_flow(model, x, embeds, block=3, policy="full") - plain).abs().max() < 2e-5


def test_refuses_what_it_cannot_run(transformer):
    with pytest.raises(ValueError, match="WanTransformer3DModel is needed"):
        CausalTransformer(torch.nn.Linear(2, 2))
    causal = CausalTransformer(transformer)
    with pytest.raises(ValueError, match="3 channels"):
        causal.geometry((3, 4, 4), frames_per_block=3)
    with pytest.raises(ValueError, match="not divisible by the patch"):
        causal.geometry((4, 5, 4), frames_per_block=3)
    image = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        text_dim=8,
        ffn_dim=8,
        num_layers=1,
        image_dim=8,
        added_kv_proj_dim=12,
    )
    with pytest.raises(ValueError, match="conditioned on images"):
        CausalTransformer(image)


def test_bfloat16_is_as_close_to_float32_as_stock_is(transformer, inputs, tmp_path):
    """The fused modulation must not cost precision where weights and activations are bfloat16."""
    x, embeds = inputs
    transformer.save_pretrained(tmp_path)
    half = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    mask = reference.frame_mask(3, lambda f: range(3))
    arguments = {"timesteps": [500.0] * 3, "mask": mask}
    exact = reference.masked_flow(transformer, x[:, :3], prompt_embeds=embeds, **arguments)
    stock = reference.masked_flow(half, x[:, :3].bfloat16(), prompt_embeds=embeds.bfloat16(), **arguments).float()
    ours = cached_flow(half, x[:, :3], embeds.bfloat16(), block=3, policy="full", timestep=500.0)
    assert (ours - exact).norm() < 1.2 * (stock - exact).norm()
    assert (ours - exact).norm() / exact.norm() < 0.03
