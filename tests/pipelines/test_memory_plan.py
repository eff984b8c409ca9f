"""The plan against live tensors, loaded weights and published figures."""

from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes
from transformers import UMT5Config, UMT5EncoderModel

from benchmarks.models import make_transformer, make_vae
from benchmarks.width_plan import attend_nothing
from longtake.cache import KVCache, Pass, make_policy
from longtake.configs.families import ModelFamily, load_family
from longtake.models import StreamingDecoder, use_fast_kernels
from longtake.models.causal import CausalTransformer, Prompt, Segment
from longtake.pipelines import LongVideoPipeline
from longtake.pipelines.long_video import to_bytes, to_pixels
from longtake.pipelines.memory_plan import (
    PROGRAM_BYTES,
    ModelShapes,
    PlanRequest,
    _shapes_of,
    count_numbers,
    machine_memory,
    plan_memory,
)
from longtake.samplers import make_sampler

TRANSFORMER = {
    **{"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4},
    **{"text_dim": 16, "freq_dim": 32, "ffn_dim": 192, "num_layers": 2},
}
VAE = {
    **{"base_dim": 8, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "z_dim": 4, "temperal_downsample": [True, True]},
    **{"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 8, "scale_factor_temporal": 4},
    **{"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
}
UMT5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
POLICY = {"policy": "attention_sink", "num_context_frames": 9, "num_sink_frames": 3}

DEEP = {"policy": "deep_forcing", "num_context_frames": 12, "num_sink_frames": 3, "num_budget_frames": 9}


def tiny_shapes(**transformer):
    configs = {"transformer": TRANSFORMER | transformer, "vae": VAE, "text_encoder": UMT5}
    return ModelShapes(configs, {}, "tiny")


def request(**changes):
    settings = {
        "shapes": tiny_shapes(),
        "policy": make_policy(POLICY),
        "sampler": make_sampler("few_step"),
        **{"height": 64, "width": 96, "num_latent_frames": 30, "frames_per_block": 3},
        **{"dtype": torch.float32, "device_type": "cpu", "num_text_tokens": 8},
    }
    return PlanRequest(**settings | changes)


@pytest.fixture(scope="module")
def plan():
    numbers = {"transformer": (1000, 0), "text_encoder": (10_000, 0), "vae": (100, 0)}
    return plan_memory(request(shapes=replace(tiny_shapes(), numbers=numbers)))


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("policy", [POLICY, DEEP, {"policy": "quantized", "inner": POLICY}])
@pytest.mark.parametrize("merges", [True, False])
def test_a_forwards_moment_is_that_of_live_tensors(policy, dtype, batch, merges):
    """The real forward, counted on the CPU, with what attention allocates in its place."""
    config = TRANSFORMER | {"num_attention_heads": 4, "ffn_dim": 384}
    settings = {"shapes": tiny_shapes(**config), "policy": make_policy(policy), "dtype": dtype, "batch_size": batch}
    planned = plan_memory(request(**settings, merge_commit=merges, height=256, width=384))
    causal = CausalTransformer(make_transformer(config, dtype, num_layers=2, device="cpu"), attention=attend_nothing)
    geometry = replace(planned.request.geometry(), device=torch.device("cpu"))
    cache = KVCache(make_policy(policy), geometry, attention=attend_nothing)
    prompt = Prompt(torch.zeros(batch, 8, 16, dtype=dtype))
    with torch.no_grad(), LiveBytes("cpu") as live, causal.installed():
        for block in range(6):
            before = live.now
            live.restart()
            clean = torch.zeros(batch, 3, 4, 32, 48)
            commit = Segment(Pass("commit", block, 3 * block, 3), 0.0)
            denoise = Segment(Pass("denoise", block, 3 * block, 3), 1.0)
            following = Segment(Pass("denoise", block + 1, 3 * block + 3, 3), 1.0)
            causal.flow(clean.clone(), segments=[denoise], cache=cache, prompt=prompt)
            x, segments = (torch.cat((clean, clean), dim=1), [commit, following]) if merges else (clean, [commit])
            causal.flow(x, segments=segments, cache=cache, prompt=prompt)
            del clean, x
    assert planned.forward == pytest.approx(live.peak - before, rel=0.12)
    layers = sum(tensor.nbytes for pair in prompt.keys_values.values() for tensor in pair)
    assert planned.text == layers + prompt.embeds.nbytes + prompt.projected.nbytes


JOINT = {"sampler": make_sampler("rolling_window"), "policy": make_policy("rolling_forcing"), "merge_commit": False}
SLIDING = make_policy({"policy": "sliding_window", "num_context_frames": 21, "positions": "absolute"})


@pytest.mark.parametrize(
    ("figure", "changes", "larger", "least", "most"),
    [
        ("forward", {"merge_commit": False}, {"shapes": tiny_shapes(ffn_dim=384)}, 1.2, 2),
        ("forward", {"merge_commit": False}, {"merge_commit": True}, 1.2, 3),
        ("forward", {"policy": SLIDING, "merge_commit": False}, JOINT, 2, 6),
        ("held", {"num_latent_frames": 60}, {"num_latent_frames": 120}, 1, 1),
        ("held", {"policy": make_policy("full"), "num_latent_frames": 60}, {"num_latent_frames": 120}, 1.5, 2),
    ],
    ids=["wide feed-forward", "joint commit", "windows of blocks", "length, bounded cache", "length, full history"],
)
def test_a_plan_grows_with(figure, changes, larger, least, most):
    before, after = (getattr(plan_memory(request(**settings)), figure) for settings in (changes, changes | larger))
    assert least * before <= after <= most * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_that_of_live_tensors(dtype):
    planned = plan_memory(request(dtype=dtype, height=64, width=96))
    vae = make_vae(VAE, dtype, device="cpu")
    use_fast_kernels(vae)
    decoder = StreamingDecoder(vae)
    z = torch.zeros(1, 4, 3, 8, 12, dtype=dtype)
    with LiveBytes("cpu") as live:
        decoder.decode(z[:, :, :1])
        decoder.decode(z[:, :, :1])
        before = live.now
        live.restart()
        to_bytes(to_pixels(decoder.decode(z)))
    held = sum(tensor.nbytes for tensor in decoder.state_dict()[0].values())
    assert planned.features == before == held
    assert planned.decoding == pytest.approx(live.peak - before, rel=0.1)


def wan(**changes):
    """A plan of Wan2.1-1.3B at 832x480, blocks of three, on a GPU."""
    shapes = _shapes_of(load_family("self_forcing"))
    settings = {"height": 480, "width": 832, "dtype": torch.bfloat16, "device_type": "cuda", "num_text_tokens": 512}
    return plan_memory(request(**settings | {"shapes": shapes} | changes))


def test_the_wan_vae_remembers_what_is_published():
    """1.76 GiB in half precision at 832x480 (the demo of Self-Forcing)."""
    assert wan(dtype=torch.float16).features / 2**30 == pytest.approx(1.76, abs=0.005)


def test_tiles_take_what_was_counted():
    """The tiled decoder at the real size took 0.65 GiB on the device, 2.91 GiB in host memory."""
    whole, tiled, here = wan(), wan(tiles_vae=True), wan(tiles_vae=True, device_type="cpu")
    assert tiled.features + tiled.decoding == pytest.approx(0.65 * 2**30, rel=0.1)
    assert tiled.features + tiled.resting == pytest.approx(2.91 * 2**30, rel=0.05)
    assert whole.resting == 0 and whole.features + whole.decoding > 4 * 0.65 * 2**30
    assert here.resting == 0 and here.features == pytest.approx(tiled.features + tiled.resting, rel=0.05)
    small, one_tile = (wan(height=240, width=256, tiles_vae=tiles) for tiles in (False, True))
    assert (one_tile.features, one_tile.resting) == (small.features, 0)


def test_an_archive_in_host_memory_does_not_count_on_the_card():
    near, far = (wan(policy=make_policy({"policy": "pack", "archive": place})) for place in ("device", "host"))
    saved = near.cache.allocated - far.cache.allocated
    assert far.cache.on_host == saved > 0
    assert near.peak - far.peak == saved - far.staging > 0
    assert far.host_peak >= near.host_peak


def test_published_shapes_are_the_published_models():
    for family in ("self_forcing", "krea_14b"):
        shapes = _shapes_of(load_family(family))
        config = shapes.configs["transformer"]
        with torch.device("meta"):
            encoder = UMT5EncoderModel(UMT5Config(**shapes.configs["text_encoder"], is_encoder_decoder=False))
        transformer = make_transformer(config, torch.float32, num_layers=config["num_layers"])
        models = {"transformer": transformer, "text_encoder": encoder, "vae": make_vae({}, torch.float32)}
        for part, model in models.items():
            parameters = {name: p.numel() for name, p in model.named_parameters()}
            assert shapes.numbers[part] == count_numbers(part, parameters)
    with pytest.raises(ValueError, match="says no size"):
        _shapes_of(ModelFamily())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folders_weights_are_those_that_are_loaded(tiny_folder, dtype):
    planned = _shapes_of(load_family("mini"), tiny_folder).weight_bytes(dtype)
    pipe = LongVideoPipeline.from_pretrained(tiny_folder, family="mini", dtype=dtype)
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "vae": pipe.vae}
    assert planned == {part: sum(p.nbytes for p in model.parameters()) for part, model in parts.items()}


def test_phases_add_up(plan):
    assert plan.weights == {"transformer": 4000, "text_encoder": 40_000, "vae": 400}
    assert plan.phases["text encoding"] == PROGRAM_BYTES + 44_400 + plan.encoding
    assert plan.phases["denoising"] == PROGRAM_BYTES + 44_400 + plan.held + plan.denoising
    assert plan.phases["decoding"] == PROGRAM_BYTES + 44_400 + plan.held + plan.decoding
    assert plan.held == plan.cache.on_device + plan.text + plan.modulation + plan.features
    assert plan.peak == plan.host_peak == max(plan.phases.values())


def test_parts_leave_the_device(plan):
    freed = replace(plan, request=replace(plan.request, text_encoder="freed"))
    assert plan.phases["denoising"] - freed.phases["denoising"] == 40_000
    assert freed.phases["text encoding"] == plan.phases["text encoding"]
    gpu = replace(plan, request=replace(plan.request, text_encoder="freed", device_type="cuda"))
    assert "text encoding" not in gpu.phases and gpu.host_peak > PROGRAM_BYTES
    one_by_one = replace(plan, request=replace(plan.request, offloads=True, device_type="cuda"))
    assert one_by_one.weights_in("denoising") == 4000 and one_by_one.weights_in("decoding") == 400


def test_guidance_takes_a_cache_for_each_branch(plan):
    sampler = make_sampler({"name": "multi_step", "guidance_scale": 3.0})
    guided = plan_memory(request(sampler=sampler, shapes=plan.request.shapes))
    assert guided.cache == plan.cache
    assert guided.held - guided.modulation - guided.features == 2 * (plan.held - plan.modulation - plan.features)


def test_what_does_not_fit_the_blocks_is_refused():
    with pytest.raises(ValueError, match="num_context_frames=3"):
        plan_memory(request(policy=make_policy({**POLICY, "num_context_frames": 3})))


def test_this_machine_has_memory():
    total, available = machine_memory("cpu")
    assert 0 < available <= total
