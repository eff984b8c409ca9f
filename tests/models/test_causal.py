"""Block by block with a cache equals one masked pass of the stock transformer."""

import block_causal as reference
import pytest
import torch
from diffusers import WanTransformer3DModel

from longtake.attention import sdpa
from longtake.cache import KVCache, Pass, make_policy
from longtake.models import CausalTransformer, Prompt, Segment

SHAPE = (4, 6, 4)
GENERATOR = torch.Generator().manual_seed(1)
X, EMBEDS = torch.randn(2, 12, *SHAPE, generator=GENERATOR), torch.randn(2, 7, 16, generator=GENERATOR)


@pytest.fixture(scope="module")
def transformer(make_transformer):
    return make_transformer(num_layers=3)


def cached(model, *, block, policy="full", x=X):
    """The model, a cache and a prompt."""
    causal = CausalTransformer(model)
    geometry = causal.geometry(SHAPE, frames_per_block=block, batch_size=2)
    return causal, {"cache": KVCache(make_policy(policy), geometry, attention=sdpa), "prompt": Prompt(EMBEDS.to(x))}


def cached_flow(model, x=X, *, block=3, policy="full", timestep=0.0, merge=False):
    """Commit all blocks one after the other and return what each forward predicted."""
    (causal, options), out = cached(model, block=block, policy=policy, x=x), []

    def segment(kind, start):
        return Segment(Pass(kind, start // block, start, block), timestep)

    with causal.installed():
        for start in range(0, x.shape[1], block):
            segments = [segment("commit", start)]
            if merge:  # the commit of a block and the first denoising pass of the next, in one forward
                segments = [segment("commit", start - block)] * (start > 0) + [segment("denoise", start)]
            part = x[:, start + block - block * len(segments) : start + block]
            out.append(causal.flow(part, segments=segments, **options)[:, -block:])
    return torch.cat(out, 1)


def masked_flow(model, x=X, *, reads, timesteps=None):
    """One stock pass in which a frame reads what ``reads`` says."""
    mask = reference.frame_mask(x.shape[1], reads)
    timesteps = timesteps or [0.0] * x.shape[1]
    return reference.masked_flow(model, x, timesteps=timesteps, prompt_embeds=EMBEDS.to(x), mask=mask)


def window(block, frames, sinks=0):
    """Frame -> frames it may attend to under a window with sinks."""

    def reads(frame):
        start = frame // block * block
        own = range(start, start + block)
        first = max(0, start + block - (frames - min(sinks, start)))
        return [*range(min(sinks, start)), *range(first, start), *own]

    return reads


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("merge", [False, True])
def test_full_equals_one_block_causal_pass(transformer, block, merge):
    ours = cached_flow(transformer, block=block, merge=merge)
    expected = masked_flow(transformer, reads=lambda f: range(f // block * block + block))
    assert (ours - expected).abs().max() < 2e-5
    assert (ours - masked_flow(transformer, reads=lambda f: range(12))).abs().max() > 1e-3


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(("frames", "sinks"), [(6, 0), (9, 3), (4, 1)])
def test_windows_equal_one_masked_pass(transformer, block, frames, sinks):
    policy = {"policy": "attention_sink", "num_context_frames": frames, "num_sink_frames": sinks}
    ours = cached_flow(transformer, block=block, policy=policy | {"positions": "absolute"})
    right, wrong = (masked_flow(transformer, reads=window(block, length, sinks)) for length in (frames, frames + 1))
    assert (ours - right).abs().max() < 2e-5
    assert (ours - wrong).abs().max() > 1e-4


def test_per_frame_timesteps_in_one_forward(transformer):
    causal, options = cached(transformer, block=3)
    segments = [Segment(Pass("commit", 0, 0, 3), 0.0), Segment(Pass("denoise", 1, 3, 3), 937.5)]
    with causal.installed():
        ours = causal.flow(X[:, :6], segments=segments, **options)
    timesteps = [0.0] * 3 + [937.5] * 3
    expected = masked_flow(transformer, X[:, :6], reads=lambda f: range(f // 3 * 3 + 3), timesteps=timesteps)
    assert (ours - expected).abs().max() < 2e-5


def test_denoising_never_changes_storage(transformer):
    causal, options = cached(transformer, block=3)
    with causal.installed():
        causal.flow(X[:, :3], segments=[Segment(Pass("commit", 0, 0, 3), 0.0)], **options)
        before = {name: torch.as_tensor(value).clone() for name, value in options["cache"].state_dict().items()}
        causal.flow(X[:, 3:6], segments=[Segment(Pass("denoise", 1, 3, 3), 500.0)], **options)
    after = options["cache"].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, torch.as_tensor(after[name])) for name, value in before.items())


def test_installs_and_removes_itself_even_after_an_error(transformer):
    processors = [b.attn1.processor for b in transformer.blocks] + [b.attn2.processor for b in transformer.blocks]
    arguments = (X.transpose(1, 2), torch.tensor([5.0, 7.0]), EMBEDS)
    with torch.no_grad():
        before = transformer(*arguments).sample
        causal = CausalTransformer(transformer)
        with pytest.raises(RuntimeError, match="CausalTransformer.flow"), causal.installed():
            transformer(*arguments)
        assert torch.equal(transformer(*arguments).sample, before)
    now = [b.attn1.processor for b in transformer.blocks] + [b.attn2.processor for b in transformer.blocks]
    assert all(a is b for a, b in zip(processors, now, strict=True))


def test_fused_projections_give_the_same(make_transformer):
    model = make_transformer()
    plain = cached_flow(model)
    model.fuse_qkv_projections()
    assert (cached_flow(model) - plain).abs().max() < 2e-5


def test_refuses_what_it_cannot_run(transformer, make_transformer):
    with pytest.raises(ValueError, match="WanTransformer3DModel is needed"):
        CausalTransformer(torch.nn.Linear(2, 2))
    causal = CausalTransformer(transformer)
    with pytest.raises(ValueError, match="3 channels"):
        causal.geometry((3, 4, 4), frames_per_block=3)
    with pytest.raises(ValueError, match="not divisible by the patch"):
        causal.geometry((4, 5, 4), frames_per_block=3)
    with pytest.raises(ValueError, match="conditioned on images"):
        CausalTransformer(make_transformer(image_dim=8, added_kv_proj_dim=48))


def test_bfloat16_is_as_close_to_float32_as_stock_is(transformer, tmp_path):
    """The fused modulation must not cost precision where weights and activations are bfloat16."""
    transformer.save_pretrained(tmp_path)
    half = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    arguments = {"timesteps": [500.0] * 3, "reads": lambda f: range(3)}
    exact = masked_flow(transformer, X[:, :3], **arguments)
    stock = masked_flow(half, X[:, :3].bfloat16(), **arguments).float()
    ours = cached_flow(half, X[:, :3].bfloat16(), timestep=500.0).float()
    assert (ours - exact).norm() < 1.2 * (stock - exact).norm()
    assert (ours - exact).norm() / exact.norm() < 0.03
