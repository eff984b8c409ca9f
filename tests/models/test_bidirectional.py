"""Sparse stock pipelines: equal where nothing is left out, right where something is, and stock again afterwards."""

import copy

import pytest
import radial as reference
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from longtake.attention import BackendUnavailable
from longtake.models.bidirectional import sparse_wan

NUM_FRAMES, GRID = 5, (4, 4)  # 17 frames of 64 x 64 pixels
NUM_TOKENS = NUM_FRAMES * GRID[0] * GRID[1]
EVERYWHERE = {"dense_steps": 0, "dense_layers": 0}
RADIAL = {"policy": "radial", "block_size": 4}
WHOLE = {**RADIAL, **EVERYWHERE, "thin_below": 1, "decay_factor": 16.0}  # bands as wide as frames
SPARSE = {**RADIAL, **EVERYWHERE}
DENSITY = 0.64


@pytest.fixture
def pipe(tiny_folder):
    pipe = WanPipeline.from_pretrained(tiny_folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        shift=5.0
    )  # the folder's own draws noise from the global generator
    # Random weights make flat attention, on which a mask would hardly show.
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.weight.data.mul_(4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def film(pipe, **options):
    options = {
        "prompt": ["red circle", "blue square moving left"],
        "negative_prompt": "plain",
        "height": 64,
        "width": 64,
        "num_frames": 17,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "max_sequence_length": 8,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    } | options
    return pipe(**options).frames


def state_of(pipe):
    """All that sparse attention, or a careless version of it, could leave behind."""
    transformer = pipe.transformer
    registry = _AttentionBackendRegistry
    hooks = {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks), len(module._forward_pre_hooks_with_kwargs))
        for name, module in transformer.named_modules()
    }
    return {
        "processors": {name: id(own) for name, own in transformer.attn_processors.items()},
        "settings": [dict(vars(own)) for own in transformer.attn_processors.values()],
        "class": dict(vars(WanAttnProcessor)),
        "hooks": hooks,
        "forwards": {name: "forward" in vars(module) for name, module in transformer.named_modules()},
        "registries": [hasattr(module, "_diffusers_hook") for module in transformer.modules()],
        "active": registry._active_backend,
        "backends": dict(registry._backends),
        "checks": registry._checks_enabled,
    }


class Masked:
    """diffusers' own processor, given a mask of tokens."""

    def __init__(self, mask):
        self.mask, self.stock = mask[None, None], WanAttnProcessor()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return self.stock(attn, hidden_states, None, self.mask, rotary_emb)


def masked(transformer, mask):
    """The transformer in float64 under a mask, whatever its layers."""
    transformer = copy.deepcopy(transformer).double()
    for block in transformer.blocks:
        block.attn1.set_processor(Masked(mask))
    return transformer


def radial_tokens():
    blocks = reference.block_mask(NUM_FRAMES, 16, block_size=4)
    return blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)


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


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_mask_that_leaves_nothing_out_gives_the_stock_pipelines_latents(pipe, guidance_scale):
    stock = film(pipe, guidance_scale=guidance_scale)
    with sparse_wan(pipe, WHOLE, backend="gather_sdpa") as sparse:
        ours = film(pipe, guidance_scale=guidance_scale)
    assert ours.shape == stock.shape == (2, 4, NUM_FRAMES, 8, 8)
    assert (ours - stock).abs().max() < 1e-5 < stock.std()
    assert sparse.density == 1 and sparse.num_dense_calls == 0
    assert sparse.num_calls == 3 * 2 * (2 if guidance_scale > 1 else 1)
    assert torch.equal(film(pipe, guidance_scale=guidance_scale), stock)


@pytest.mark.parametrize("backend", ["gather_sdpa", "sdpa_masked"])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_sparse_forward_is_masked_attention_in_float64(pipe, inputs, backend, is_fused):
    transformer = pipe.transformer
    wide = {
        key: value.double() if isinstance(value, torch.Tensor) and key != "timestep" else value
        for key, value in inputs.items()
    }
    expected = forward(masked(transformer, radial_tokens()), wide)
    wrong = forward(masked(transformer, radial_tokens().flip(0)), wide)
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
    attention = {"policy": "svg2", **EVERYWHERE, "min_cluster_tokens": 8, "top_p": 0.5}
    latents = torch.randn(2, 4, NUM_FRAMES, 8, 8, generator=torch.Generator().manual_seed(3))
    prompts = ["red circle", "blue square"]
    with sparse_wan(pipe, attention) as sparse:
        both = film(pipe, prompt=prompts, latents=latents)
        alone = torch.cat([film(pipe, prompt=p, latents=latents[i : i + 1]) for i, p in enumerate(prompts)])
    assert (both - alone).abs().max() < 1e-4
    assert sparse.density < 1


def test_bfloat16(pipe):
    pipe.transformer.to(torch.bfloat16)
    stock = film(pipe)
    with sparse_wan(pipe, WHOLE):
        assert (film(pipe) - stock).abs().max() < 0.1
    with sparse_wan(pipe, SPARSE):
        assert film(pipe).isfinite().all()


def told(monkeypatch):
    seen = []
    from longtake.attention.policies.radial import Radial

    plan = Radial.plan

    def spy(self, q, k, geometry, **options):
        seen.append((geometry, id(options["memory"])))
        return plan(self, q, k, geometry, **options)

    monkeypatch.setattr(Radial, "plan", spy)
    return seen


def schedulers():
    return {
        "its own": None,
        "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


@pytest.mark.parametrize("scheduler", schedulers())
def test_steps_layers_and_shapes(pipe, monkeypatch, scheduler):
    pipe.scheduler = schedulers()[scheduler] or pipe.scheduler
    seen = told(monkeypatch)
    with sparse_wan(pipe, SPARSE):
        film(pipe)
    expected = [(step, layer) for step in range(3) for _ in ("cond", "uncond") for layer in range(2)]
    assert [(g.step_index, g.layer) for g, _ in seen] == expected
    assert {(g.num_steps, g.num_layers, g.grid, len(g.query_frames), g.frames_per_block) for g, _ in seen} == {
        (3, 2, GRID, NUM_FRAMES, None)
    }
    branches = [memory for _, memory in seen]
    assert branches == [*[branches[0]] * 2, *[branches[2]] * 2] * 3 and branches[0] != branches[2]


def test_evaluations_at_one_timestep_are_one_step(pipe, inputs, monkeypatch):
    """A second-order scheduler names every timestep but the first twice."""
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    pipe.scheduler.set_timesteps(3)
    seen = told(monkeypatch)
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
    attention = {"policy": "svg2", **EVERYWHERE, "min_cluster_tokens": 8, "top_p": 0.5}

    def stop(*_):
        raise KeyboardInterrupt

    with sparse_wan(pipe, attention):
        first = film(pipe)
        with pytest.raises(KeyboardInterrupt):
            film(pipe, callback_on_step_end=stop, generator=torch.Generator().manual_seed(7))
        assert torch.equal(film(pipe), first)
        film(pipe, num_inference_steps=1)
        assert torch.equal(film(pipe), first)
    with sparse_wan(pipe, attention):
        assert torch.equal(film(pipe), first)


def test_video_to_video_begins_in_the_middle_of_the_schedule(pipe, monkeypatch):
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    other = WanVideoToVideoPipeline(**{name: pipe.components[name] for name in names})
    other.set_progress_bar_config(disable=True)
    seen = told(monkeypatch)
    options = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 1.0, "max_sequence_length": 8}
    with sparse_wan(other, SPARSE):
        other(
            prompt="red",
            latents=torch.randn(1, 4, NUM_FRAMES, 8, 8),
            height=64,
            width=64,
            output_type="latent",
            **options,
        )
    assert [(g.step_index, g.num_steps) for g, _ in seen[::2]] == [(0, 2), (1, 2)]


def test_both_transformers_of_wan22_share_one_schedule(pipe, monkeypatch):
    second = copy.deepcopy(pipe.transformer)
    pipe = WanPipeline(**{**pipe.components, "transformer_2": second}, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    stock = film(pipe)
    seen = told(monkeypatch)
    with sparse_wan(pipe, WHOLE):
        assert (film(pipe) - stock).abs().max() < 1e-5
        assert pipe.transformer_2.blocks[0].attn1.processor.owner is pipe.transformer.blocks[0].attn1.processor.owner
    assert [g.step_index for g, _ in seen[::4]] == [0, 1, 2]
    # Each network has its own memories.
    assert len({memory for _, memory in seen}) == 4
    assert all(type(own) is WanAttnProcessor for own in second.attn_processors.values())


def test_timesteps_of_each_token(pipe, inputs, monkeypatch):
    """Wan2.2's small model gives every token its own; those of a given first frame are 0."""
    pipe.scheduler.set_timesteps(3)
    seen = told(monkeypatch)
    timestep = pipe.scheduler.timesteps[0].repeat(2, NUM_TOKENS)
    timestep[:, :16] = 0
    with sparse_wan(pipe, SPARSE):
        forward(pipe.transformer, inputs | {"timestep": timestep})
        later = timestep / timestep.max() * pipe.scheduler.timesteps[2]
        forward(pipe.transformer, inputs | {"timestep": later.bfloat16()})
    assert [g.step_index for g, _ in seen] == [0, 0, 2, 2]


def test_image_conditioning_is_cross_attention_and_stays(tiny_folder, inputs):
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=16,
        added_kv_proj_dim=48,
    ).eval()
    components = WanPipeline.from_pretrained(tiny_folder).components
    components = {key: components[key] for key in ("tokenizer", "text_encoder", "vae", "scheduler")}
    pipe = WanImageToVideoPipeline(
        **components, transformer=transformer, image_encoder=None, image_processor=None, transformer_2=None
    )
    inputs |= {
        "encoder_hidden_states": torch.randn(2, 512, 32),
        "encoder_hidden_states_image": torch.randn(2, 3, 16),
    }
    stock = forward(transformer, inputs)
    with sparse_wan(pipe, WHOLE) as sparse:
        assert (forward(transformer, inputs) - stock).abs().max() < 1e-5
    assert sparse.num_calls == 2


def test_nothing_is_left_behind(pipe):
    film(pipe, num_inference_steps=1)  # diffusers leaves a registry of hooks at its first call
    before = state_of(pipe)
    with sparse_wan(pipe, SPARSE):
        inside = state_of(pipe)
        film(pipe)
    assert state_of(pipe) == before
    # Cross-attention, hooks below the transformer and diffusers' registry are not touched inside either.
    changed = {name for name, own in inside["processors"].items() if own != before["processors"][name]}
    assert changed == {"blocks.0.attn1.processor", "blocks.1.attn1.processor"}
    assert {key for key in before if inside[key] != before[key]} <= {"processors", "settings", "hooks"}
    assert {name for name in before["hooks"] if inside["hooks"][name] != before["hooks"][name]} == {""}


def test_nothing_is_left_behind_by_an_exception(pipe):
    film(pipe, num_inference_steps=1)
    before = state_of(pipe)

    def fail(*_):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"), sparse_wan(pipe, SPARSE) as sparse:
        film(pipe, callback_on_step_end=fail)
    assert state_of(pipe) == before
    assert sparse.num_calls == 4 and 0 < sparse.density < 1

    broken = pipe.transformer.blocks[1]
    own, broken.attn1 = broken.attn1, None
    with pytest.raises(AttributeError), sparse_wan(pipe, SPARSE):
        pass
    broken.attn1 = own
    assert state_of(pipe) == before


def test_cross_attention_keeps_diffusers_backend(pipe, monkeypatch):
    """What diffusers dispatches inside is cross-attention alone."""
    from diffusers.models.transformers import transformer_wan

    keys = []
    dispatch = transformer_wan.dispatch_attention_fn

    def spy(query, key, *args, **options):
        keys.append(key.shape[1])
        return dispatch(query, key, *args, **options)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", spy)
    with sparse_wan(pipe, SPARSE):
        film(pipe, num_inference_steps=1, guidance_scale=1.0)
    assert keys == [8, 8]


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
    ],
)
def test_names_are_checked_before_anything_changes(pipe, attention, backend, message):
    before = state_of(pipe)
    with pytest.raises(ValueError, match=message), sparse_wan(pipe, attention, backend=backend):
        pass
    assert state_of(pipe) == before


def test_a_backend_that_is_not_here(pipe):
    with pytest.raises(BackendUnavailable, match="flash4"), sparse_wan(pipe, backend="flash4"):
        pass


def test_other_transformers_are_refused(pipe):
    with pytest.raises(ValueError, match="has no scheduler and transformer"), sparse_wan(pipe.transformer):
        pass
    own, pipe.transformer = pipe.transformer, torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="OptimizedModule"), sparse_wan(pipe):
        pass
    pipe.transformer = None
    with pytest.raises(ValueError, match="without a transformer"), sparse_wan(pipe):
        pass
    pipe.transformer = own
    with sparse_wan(pipe), pytest.raises(ValueError, match="SparseWanProcessor"), sparse_wan(pipe):
        pass


def test_parallelism_is_refused(pipe, inputs, monkeypatch):
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(ulysses_degree=2)
    with sparse_wan(pipe):
        monkeypatch.setattr(pipe.transformer, "_parallel_config", config)
        with pytest.raises(ValueError, match="parallel_config"):
            forward(pipe.transformer, inputs)
    with pytest.raises(ValueError, match="parallel_config"), sparse_wan(pipe):
        pass


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


def test_a_policy_for_blocks_of_a_rollout_is_refused(pipe):
    with pytest.raises(ValueError, match="has no bidirectional form"), sparse_wan(pipe, "light_forcing"):
        pytest.fail("the block must not begin")
    assert all(type(own) is WanAttnProcessor for own in pipe.transformer.attn_processors.values())
