"""Every family's published form: converts, loads strictly, and gives the forward of the weights it was made from."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import FAMILIES, LORA, MODEL_BF16, WAN_BF16, contents, shapes_of
from diffusers import WanTransformer3DModel
from make_checkpoint import write_family

from longtake.models.checkpoints.converting import ConversionRequest, plan_conversion
from longtake.models.checkpoints.files import TensorInfo, open_checkpoint
from longtake.models.checkpoints.wan_parts import find_transformer

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
ALPHA = 8.0  # twice the rank, so that a forgotten scale shows

# The entry that is meant, from the families' own loaders.
AVERAGED = {"self_forcing", "self_forcing_training", "infinite_forcing", "rolling_forcing", "causal_forcing_long"}
FLAT = {"wan", "reward_forcing", "krea", "diffusers"}
TAKEN = dict.fromkeys(FAMILIES, "generator") | dict.fromkeys(AVERAGED, "generator_ema") | dict.fromkeys(FLAT, "")
ADAPTERS = {"longlive": "generator_lora", "anchor_forcing": ""}
# A name in the file, written by hand.
NAMES = {
    "krea": "model.blocks.1.self_attn.q.weight",
    "infinite_forcing": "model._fsdp_wrapped_module.blocks.1.self_attn.q.weight",
    "rolling_forcing": "model._fsdp_wrapped_module.blocks.1._fsdp_wrapped_module.self_attn.q.weight",
    "longlive": "base_model.model.blocks.1.self_attn.q.lora_A.weight",
}


def merged_by_hand(weights, path, entry):
    """Adapters added in float32, by their original names."""
    found = torch.load(path, weights_only=True)
    factors = found[entry] if entry else found
    weights = dict(weights)
    downs = [name for name in factors if name.endswith(".lora_A.weight")]
    assert len(downs) == len(factors) / 2 == 2 * 10
    for name in downs:
        a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[target] = weights[target] + ALPHA / a.shape[0] * (b @ a)
    return weights


@torch.no_grad()
def forward(model):
    """One pass over two frames of random numbers, float32."""
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 2, 4, 6, generator=generator), torch.randn(1, 5, 8, generator=generator)
    return model(latents, torch.tensor([500.0]), text, return_dict=False)[0]


def test_names_are_those_of_the_published_files(tmp_path):
    for family, name in NAMES.items():
        *_, path = write_family(tmp_path / family, family)
        assert any(name in tensors for tensors in open_checkpoint(path).entries.values()), family


@pytest.mark.parametrize("family", FAMILIES)
def test_converts_to_the_same_forward(family, tmp_path, read_by_hand, build_reference):
    files, entry = write_family(tmp_path / "repository", family), TAKEN[family]
    weights, lora = read_by_hand(files[0], entry), {}
    if family in ADAPTERS:
        weights = merged_by_hand(weights, files[1], ADAPTERS[family])
        lora = {"lora": files[1], "lora_alpha": ALPHA, "dtype": "float32"}
    conversion = plan_conversion(ConversionRequest(source=files[0], **lora))
    assert conversion.transformer.entry == entry
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
    made = contents(WAN_BF16, shapes_of("1.3B"), rank=256)
    expected = json.loads((GOLDEN / "keys" / "wan_1_3b_original_keys.json").read_text())
    assert {name: list(shape) for name, (_, shape) in made.items()} == expected
    expected = json.loads((GOLDEN / "keys" / "wan_1_3b_diffusers_keys.json").read_text())
    assert {name: list(shape) for name, shape in shapes_of("1.3B").items()} == expected


def test_full_size_is_that_of_the_published_models(header_only):
    for layout, size, count in ((WAN_BF16, "1.3B", 1_418_996_800), (MODEL_BF16, "14B", 14_288_491_584)):
        made = contents(layout, shapes_of(size), rank=256)
        infos = {name: TensorInfo(shape, torch.bfloat16) for name, (_, shape) in made.items()}
        found = find_transformer(header_only({"": infos}))
        assert found.size == size and sum(info.num_elements for info in found.infos.values()) == count
    adapters = contents(LORA, shapes_of("1.3B"), rank=256)
    assert len(adapters) == 600  # 10 layers in each of 30 blocks
    assert sum(torch.Size(shape).numel() for _, shape in adapters.values()) == pytest.approx(350e6, rel=0.01)
