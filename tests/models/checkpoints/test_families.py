"""Every family's published form: converts, loads strictly, and gives the forward of the weights it was made from."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import FAMILIES, SIZES, contents
from diffusers import WanTransformer3DModel
from make_checkpoint import write_family

from longtake.models.checkpoints.converting import ConversionRequest, plan_conversion
from longtake.models.checkpoints.wan_parts import expected_shapes

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
ALPHA = 8.0  # twice the rank, so that a forgotten scale shows

# Written by hand from the families' own loaders: files, the entry that is meant, a name that must be in it.
FACTS = {
    "wan": ("diffusion_pytorch_model.safetensors", None, "blocks.1.self_attn.q.weight"),
    "self_forcing": ("checkpoints/self_forcing_dmd.pt", "generator_ema", "model.blocks.1.self_attn.q.weight"),
    "self_forcing_ode": ("checkpoints/ode_init.pt", "generator", "model.blocks.1.self_attn.q.weight"),
    "self_forcing_training": (
        "checkpoint_model_000600/model.pt",
        "generator_ema",
        "model._fsdp_wrapped_module.blocks.1._fsdp_wrapped_module.self_attn.q.weight",
    ),
    "infinite_forcing": ("ema_model.pt", "generator_ema", "model._fsdp_wrapped_module.blocks.1.self_attn.q.weight"),
    "rolling_forcing": (
        "checkpoints/rolling_forcing_dmd.pt",
        "generator_ema",
        "model._fsdp_wrapped_module.blocks.1._fsdp_wrapped_module.self_attn.q.weight",
    ),
    "causal_forcing_chunkwise": (
        "chunkwise/causal_forcing.pt",
        "generator",
        "model._fsdp_wrapped_module.blocks.1.self_attn.q.weight",
    ),
    "causal_forcing_framewise": (
        "framewise/causal_forcing.pt",
        "generator",
        "model._fsdp_wrapped_module.blocks.1.self_attn.q.weight",
    ),
    "causal_forcing_long": (
        "chunkwise/longvideo.pt",
        "generator_ema",
        "model._fsdp_wrapped_module.blocks.1.self_attn.q.weight",
    ),
    "longlive": ("models/longlive_base.pt", "generator", "model.blocks.1.self_attn.q.weight"),
    "anchor_forcing": ("base.pt", "generator", "model.blocks.1.self_attn.q.weight"),
    "reward_forcing": ("rewardforcing.pt", None, "model.blocks.1.self_attn.q.weight"),
    "causvid": ("autoregressive_checkpoint/model.pt", "generator", "model.blocks.1.self_attn.q.weight"),
    "krea": ("krea-realtime-video-14b.safetensors", None, "model.blocks.1.self_attn.q.weight"),
    "diffusers": ("transformer/diffusion_pytorch_model.safetensors", None, "blocks.1.attn1.to_q.weight"),
}
ADAPTERS = {"longlive": ("models/lora.pt", "generator_lora"), "anchor_forcing": ("final.pt", None)}
ADAPTER_NAME = "base_model.model.blocks.1.self_attn.q.lora_A.weight"


def merged_by_hand(weights, path, entry):
    """Adapters added in float32, by their original names."""
    found = torch.load(path, weights_only=True)
    factors = found if entry is None else found[entry]
    assert ADAPTER_NAME in factors
    weights = dict(weights)
    downs = [name for name in factors if name.endswith(".lora_A.weight")]
    assert len(downs) == len(factors) / 2 == 2 * 10
    for name in downs:
        a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[target] = weights[target] + ALPHA / a.shape[0] * (b @ a)
    return weights


def test_all_families_are_there():
    assert FACTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FACTS)
def test_converts_to_the_same_forward(family, tmp_path, read_by_hand, build_reference, forward, original_names):
    files = write_family(tmp_path / "repository", family)
    name, entry, example = FACTS[family]
    assert files[0] == tmp_path / "repository" / name
    raw = torch.load(files[0], weights_only=True) if name.endswith(".pt") else None
    assert raw is None or example in (raw if entry is None else raw[entry])
    weights = read_by_hand(files[0], entry)
    assert family == "diffusers" or sorted(weights) == sorted(original_names(2))
    lora = {}
    if family in ADAPTERS:
        adapter, adapter_entry = ADAPTERS[family]
        assert files[1] == tmp_path / "repository" / adapter
        weights = merged_by_hand(weights, files[1], adapter_entry)
        lora = {"lora": files[1], "lora_alpha": ALPHA, "dtype": "float32"}
    conversion = plan_conversion(ConversionRequest(source=files[0], **lora))
    assert conversion.transformer.entry == (entry or "")
    conversion.write(tmp_path / "out")
    model, info = WanTransformer3DModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, torch_dtype=torch.float32
    )
    assert not any(info.values()), info
    expected = build_reference(weights)
    reference = forward(expected)
    assert reference.isfinite().all() and reference.abs().max() > 0.1
    # A copy, because weights mapped from a file may lie unaligned, and then CPU kernels add up in another order.
    assert (forward(build_reference(model.state_dict())) - reference).abs().max() <= 1e-6
    converted = model.state_dict()
    assert all(torch.equal(converted[name], weight) for name, weight in expected.state_dict().items())
    if family == "self_forcing":  # the other entry of the file is another model
        other = forward(build_reference(read_by_hand(files[0], "generator")))
        assert (other - reference).abs().max() > 0.1


@pytest.mark.parametrize("family", ["self_forcing", "diffusers"])
def test_dtypes_are_kept_unless_told(family, tmp_path):
    (path,) = write_family(tmp_path / "repository", family)
    kept = plan_conversion(ConversionRequest(source=path)).parts[0].tensors
    stored = torch.float32 if family == "self_forcing" else torch.bfloat16
    assert {tensor.info.dtype for tensor in kept} == {stored}
    cast = plan_conversion(ConversionRequest(source=path, dtype="float16")).parts[0].tensors
    assert {tensor.info.dtype for tensor in cast} == {torch.float16}


def test_the_825_true_names_and_shapes():
    (layout,) = FAMILIES["wan"]
    made = contents(layout.entries[""], expected_shapes(SIZES["1.3B"]), rank=256)
    expected = json.loads((GOLDEN / "keys" / "wan_1_3b_original_keys.json").read_text())
    assert {name: list(shape) for name, (_, shape) in made.items()} == expected
    expected = json.loads((GOLDEN / "keys" / "wan_1_3b_diffusers_keys.json").read_text())
    assert {name: list(shape) for name, shape in expected_shapes(SIZES["1.3B"]).items()} == expected


def test_full_size_is_that_of_the_published_models(header_only):
    from longtake.models.checkpoints.files import TensorInfo
    from longtake.models.checkpoints.wan_parts import find_transformer

    for family, size, count in (("wan", "1.3B", 1_418_996_800), ("krea", "14B", 14_288_491_584)):
        made = contents(FAMILIES[family][0].entries[""], expected_shapes(SIZES[size]), rank=256)
        infos = {name: TensorInfo(shape, torch.bfloat16) for name, (_, shape) in made.items()}
        found = find_transformer(header_only({"": infos}))
        assert found.size == size and sum(info.num_elements for info in found.infos.values()) == count
    adapters = contents(FAMILIES["longlive"][1].entries["generator_lora"], expected_shapes(SIZES["1.3B"]), rank=256)
    assert len(adapters) == 600  # 10 layers in each of 30 blocks
    assert sum(torch.Size(shape).numel() for _, shape in adapters.values()) == pytest.approx(350e6, rel=0.01)
