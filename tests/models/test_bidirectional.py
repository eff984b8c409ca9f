"""Sparse stock pipelines: equal where nothing is left out, right where something is, and stock again afterwards."""

import copy
from functools import partial

import pytest
import radial as reference
import stock_wan
import torch
from block_causal import Masked
from diffusers import (
    ContextParallelConfig,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from stock_wan import state_of

from longtake.attention import BackendUnavailable
from longtake.attention.policies.radial import Radial
from longtake.models.bidirectional import sparse_wan

NUM_FRAMES, GRID = 5, (4, 4)
NUM_TOKENS = NUM_FRAMES * GRID[0] * GRID[1]
EVERYWHERE = {"dense_steps": 0, "dense_layers": 0}
RADIAL = {"policy": "radial", "block_size": 4}
WHOLE = {**RADIAL, **EVERYWHERE, "thin_below": 1, "decay_factor": 16.0}  # bands as wide as frames
SPARSE = {**RADIAL, **EVERYWHERE}
REMEMBERING = {"policy": "svg2", **EVERYWHERE, "min_cluster_tokens": 8, "top_p": 0.5}  # looks at tokens
DENSITY = 0.64
UNIPC = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
film = partial(stock_wan.film, num_latent_frames=NUM_FRAMES, num_inference_steps=3)


@pytest.fixture
def pipe(tiny_folder):
    return stock_wan.stock_pipe(tiny_folder)


@pytest.fixture
def seen(monkeypatch):
    """Geometry and memory of every call of the policy."""
    calls, plan = [], Radial.plan

    def spy(self, q, k, geometry, **options):
        calls.append((geometry, id(options["memory"])))
        return plan(self, q, k, geometry, **options)

    monkeypatch.setattr(Radial, "plan", spy)
    return calls


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, NUM_FRAMES, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=generator),
        "timestep": torch.full((2,), 1000.0),
        "return_dict": False,
    }


@torch.no_grad()
def forward(transformer, inputs):
    return transformer(**inputs)[0]


@pytest.mark.parametrize(
    ("guidance_scale", "dtype", "tolerance"),
    [(1.0, torch.float32, 1e-5), (4.0, torch.float32, 1e-5), (4.0, torch.bfloat16, 0.1)],
)
def test_a_mask_that_leaves_nothing_out_gives_the_stock_pipelines_latents(pipe, guidance_scale, dtype, tolerance):
    pipe.transformer.to(dtype)
    stock = film(pipe, guidance_scale=guidance_scale)
    with sparse_wan(pipe, WHOLE, backend="gather_sdpa") as sparse:
        ours = film(pipe, guidance_scale=guidance_scale)
    assert ours.shape == stock.shape == (2, 4, NUM_FRAMES, 8, 8)
    assert (ours - stock).abs().max() < tolerance < stock.std()
    assert sparse.density == 1 and sparse.num_dense_calls == 0
    assert sparse.num_calls == 3 * 2 * (2 if guidance_scale > 1 else 1)
    assert torch.equal(film(pipe, guidance_scale=guidance_scale), stock)


@pytest.mark.parametrize(("backend", "is_fused"), [("gather_sdpa", False), ("sdpa_masked", True)])
def test_a_sparse_forward_is_masked_attention_in_float64(pipe, inputs, backend, is_fused):
    transformer = pipe.transformer
    mask = reference.block_mask(NUM_FRAMES, 16, block_size=4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    wide, exact = copy.deepcopy(transformer).double(), []
    for tokens in (mask, mask.flip(0)):
        for block in wide.blocks:
            block.attn1.set_processor(Masked(tokens[None, None]))
        numbers = {key: inputs[key].double() for key in ("hidden_states", "encoder_hidden_states")}
        exact.append(forward(wide, inputs | numbers))
    expected, wrong = exact
    dense = forward(transformer, inputs)
    if is_fused:
        transformer.fuse_qkv_projections()
    with sparse_wan(pipe, SPARSE, backend=backend) as sparse:
        found = forward(transformer, inputs)
    assert (found - expected).abs().max() < 1e-5
    assert (found - dense).abs().max() > 1e-3 and (found - wrong).abs().max() > 1e-3
    assert sparse.density == pytest.approx(DENSITY)
    assert sparse.backends == {"sparse": (backend,)}


def test_samples_and_branches_do_not_see_each_other(pipe):
    """A batch equals its samples one by one, also where the policy looks at the tokens and remembers them."""
    latents = torch.randn(2, 4, NUM_FRAMES, 8, 8, generator=torch.Generator().manual_seed(3))
    prompts = ["red circle", "blue square"]
    with sparse_wan(pipe, REMEMBERING) as sparse:
        both = film(pipe, prompt=prompts, latents=latents)
        alone = torch.cat([film(pipe, prompt=p, latents=latents[i : i + 1]) for i, p in enumerate(prompts)])
    assert (both - alone).abs().max() < 1e-4
    assert sparse.density < 1


@pytest.mark.parametrize("scheduler", [None, UNIPC], ids=["its own", "unipc"])
def test_steps_layers_and_shapes(pipe, seen, scheduler):
    pipe.scheduler = scheduler or pipe.scheduler
    with sparse_wan(pipe, SPARSE):
        film(pipe)
    expected = [(step, layer) for step in range(3) for _ in ("cond", "uncond") for layer in range(2)]
    assert [(g.step_index, g.layer) for g, _ in seen] == expected
    assert {(g.num_steps, g.num_layers, g.grid, len(g.query_frames), g.frames_per_block) for g, _ in seen} == {
        (3, 2, GRID, NUM_FRAMES, None)
    }
    branches = [memory for _, memory in seen]
    assert branches == [*[branches[0]] * 2, *[branches[2]] * 2] * 3 and branches[0] != branches[2]


def test_evaluations_at_one_timestep_are_one_step(pipe, inputs, seen):
    """A second-order scheduler names every timestep but the first twice."""
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    pipe.scheduler.set_timesteps(3)
    with sparse_wan(pipe, SPARSE):
        for timestep in pipe.scheduler.timesteps:
            forward(pipe.transformer, inputs | {"timestep": timestep.expand(2)})
    assert [g.step_index for g, _ in seen[::2]] == [0, 1, 1, 2, 2]
    assert {g.num_steps for g, _ in seen} == {3}


def test_dense_steps_and_layers_are_dense(pipe):
    stock = film(pipe)
    with sparse_wan(pipe, {**SPARSE, "dense_steps": 3}) as sparse:
        assert (film(pipe) - stock).abs().max() < 1e-5
    assert sparse.density == 1 and sparse.num_dense_calls == sparse.num_calls == 12
    assert sparse.backends == {"dense": ("sdpa",)}
    with sparse_wan(pipe, {**RADIAL, "dense_steps": 1, "dense_layers": 1}) as sparse:
        assert (film(pipe) - stock).abs().max() > 1e-4
    # One of two layers, in two of three steps.
    assert sparse.num_dense_calls == 8
    assert sparse.density == pytest.approx((2 + DENSITY) / 3)
    assert str(sparse).startswith("attention 'radial': density 0.880, 8 of 12 calls dense; dense by sdpa; sparse by ")


def test_the_second_video_equals_the_first_also_after_one_that_broke_off(pipe):
    def stop(*_):
        raise KeyboardInterrupt

    with sparse_wan(pipe, REMEMBERING):
        first = film(pipe)
        with pytest.raises(KeyboardInterrupt):
            film(pipe, callback_on_step_end=stop, prompt=["navy", "red square"])
        assert torch.equal(film(pipe), first)
        film(pipe, num_inference_steps=1)
        assert torch.equal(film(pipe), first)
    with sparse_wan(pipe, REMEMBERING):
        assert torch.equal(film(pipe), first)


def test_video_to_video_begins_in_the_middle_of_the_schedule(pipe, seen):
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    options = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 1.0, "max_sequence_length": 8}
    options |= {"height": 64, "width": 64, "output_type": "latent"}
    with sparse_wan(other, SPARSE):
        other(prompt="red", latents=torch.randn(1, 4, NUM_FRAMES, 8, 8), **options)
    assert [(g.step_index, g.num_steps) for g, _ in seen[::2]] == [(0, 2), (1, 2)]


def test_both_transformers_of_wan22_share_one_schedule(pipe, seen):
    second = pipe.transformer_2 = copy.deepcopy(pipe.transformer)
    pipe.register_to_config(boundary_ratio=0.9)
    stock = film(pipe)
    with sparse_wan(pipe, WHOLE):
        assert (film(pipe) - stock).abs().max() < 1e-5
        assert second.blocks[0].attn1.processor.owner is pipe.transformer.blocks[0].attn1.processor.owner
    assert [g.step_index for g, _ in seen[::4]] == [0, 1, 2]
    # Each network has its own memories.
    assert len({memory for _, memory in seen}) == 4
    assert all(type(own) is WanAttnProcessor for own in second.attn_processors.values())


def test_timesteps_of_each_token(pipe, inputs, seen):
    """Wan2.2's small model gives every token its own; those of a given first frame are 0."""
    pipe.scheduler.set_timesteps(3)
    timestep = pipe.scheduler.timesteps[0].repeat(2, NUM_TOKENS)
    timestep[:, :16] = 0
    with sparse_wan(pipe, SPARSE):
        forward(pipe.transformer, inputs | {"timestep": timestep})
        later = timestep / timestep.max() * pipe.scheduler.timesteps[2]
        forward(pipe.transformer, inputs | {"timestep": later.bfloat16()})
    assert [g.step_index for g, _ in seen] == [0, 0, 2, 2]


def test_image_conditioning_is_cross_attention_and_stays(pipe, inputs, make_transformer):
    transformer = pipe.transformer = make_transformer(text_dim=32, image_dim=16, added_kv_proj_dim=48)
    inputs["encoder_hidden_states"] = torch.randn(2, 512, 32)
    inputs["encoder_hidden_states_image"] = torch.randn(2, 3, 16)
    stock = forward(transformer, inputs)
    with sparse_wan(pipe, WHOLE) as sparse:
        assert (forward(transformer, inputs) - stock).abs().max() < 1e-5
    assert sparse.num_calls == 2


def test_nothing_is_left_behind_even_by_an_exception(pipe):
    film(pipe, num_inference_steps=1)  # diffusers leaves a registry of hooks at its first call
    before = state_of(pipe)

    def fail(*_):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"), sparse_wan(pipe, SPARSE) as sparse:
        inside = state_of(pipe)
        film(pipe, callback_on_step_end=fail)
    assert state_of(pipe) == before
    assert sparse.num_calls == 4 and 0 < sparse.density < 1
    # Cross-attention, hooks below the transformer and diffusers' registry are not touched inside either.
    changed = {name for name, own in inside["processors"].items() if own != before["processors"][name]}
    assert changed == {"blocks.0.attn1.processor", "blocks.1.attn1.processor"}
    assert {key for key in before if inside[key] != before[key]} == {"processors", "settings", "hooks"}
    assert {name for name in before["hooks"] if inside["hooks"][name] != before["hooks"][name]} == {""}

    broken = pipe.transformer.blocks[1]
    own, broken.attn1 = broken.attn1, None
    with pytest.raises(AttributeError), sparse_wan(pipe, SPARSE):
        pass
    broken.attn1 = own
    assert state_of(pipe) == before


def test_compiled_blocks_break_their_graph_at_attention(pipe, inputs):
    stock = forward(pipe.transformer, inputs)
    for block in pipe.transformer.blocks:
        block.compile(backend="eager")
    with sparse_wan(pipe, WHOLE) as sparse:
        assert (forward(pipe.transformer, inputs) - stock).abs().max() < 1e-5
    assert sparse.num_calls == 2


@pytest.mark.parametrize(
    ("attention", "backend", "message"),
    [
        ("radal", None, "Did you mean 'radial'"),
        ({"policy": "radial", "blok_size": 4}, None, "block_size"),
        ("radial", "sdpa_maskd", "Did you mean 'sdpa_masked'"),
        ({"policy": "radial", "backend": "gather"}, None, "unknown attention backend 'gather'"),
        ("radial", "flash3", "flash3"),
        ("light_forcing", None, "has no bidirectional form"),
    ],
)
def test_settings_are_checked_before_anything_changes(pipe, attention, backend, message):
    before = state_of(pipe)
    error = BackendUnavailable if backend == "flash3" else ValueError
    with pytest.raises(error, match=message), sparse_wan(pipe, attention, backend=backend):
        pytest.fail("the block must not begin")
    assert state_of(pipe) == before


def test_pipelines_that_do_not_fit_are_refused(pipe, inputs, monkeypatch):
    def refused(pipe, message):
        with pytest.raises(ValueError, match=message), sparse_wan(pipe):
            pytest.fail("the block must not begin")

    own = pipe.transformer
    refused(own, "has no scheduler and transformer")
    pipe.transformer = torch.compile(own, backend="eager")
    refused(pipe, "OptimizedModule")
    pipe.transformer = None
    refused(pipe, "without a transformer")
    pipe.transformer = own
    with sparse_wan(pipe):
        refused(pipe, "SparseWanProcessor")
        monkeypatch.setattr(own, "_parallel_config", ContextParallelConfig(ulysses_degree=2))
        with pytest.raises(ValueError, match="parallel_config"):
            forward(own, inputs)
    refused(pipe, "parallel_config")


def test_calls_that_do_not_fit_are_refused(pipe, inputs):
    transformer = pipe.transformer
    pipe.scheduler.set_timesteps(3)
    with sparse_wan(pipe, SPARSE):
        with pytest.raises(ValueError, match="was called by itself"):
            transformer.blocks[0].attn1(torch.randn(2, NUM_TOKENS, 48))
        with pytest.raises(ValueError, match="timestep=500 is none of the scheduler's 3"):
            forward(transformer, inputs | {"timestep": torch.full((2,), 500.0)})
        attn = transformer.blocks[0].attn1
        with pytest.raises(ValueError, match="a mask or tokens of its own"):
            attn(torch.randn(2, NUM_TOKENS, 48), torch.randn(2, 3, 48))
        transformer.enable_gradient_checkpointing()
        transformer.train()
        forward(transformer, inputs)
        with pytest.raises(ValueError, match="gradient checkpointing"):
            transformer(**inputs)
        transformer.set_attn_processor(WanAttnProcessor())
        with pytest.raises(ValueError, match="WanAttnProcessor has taken the place"):
            forward(transformer, inputs)


def test_a_long_video_pipeline_has_an_argument_of_its_own(tiny_pipe):
    with sparse_wan(tiny_pipe), pytest.raises(ValueError, match="LongVideoPipeline takes attention="):
        tiny_pipe("red circle", num_frames=9, seed=0)
    assert all(type(own) is WanAttnProcessor for own in tiny_pipe.transformer.attn_processors.values())
