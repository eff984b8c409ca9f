"""Original Wan names to diffusers names: the true 825 names, golden weights, diffusers' own rules, and refusals."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from longtake.models.conversion import convert_original_state_dict, strip_wrappers

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
WRAPPERS = ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}

# Written out by hand for one layer, so that the table under test is not its own witness.
LAYER = """
modulation scale_shift_table
self_attn.q.weight attn1.to_q.weight
self_attn.q.bias attn1.to_q.bias
self_attn.k.weight attn1.to_k.weight
self_attn.k.bias attn1.to_k.bias
self_attn.v.weight attn1.to_v.weight
self_attn.v.bias attn1.to_v.bias
self_attn.o.weight attn1.to_out.0.weight
self_attn.o.bias attn1.to_out.0.bias
self_attn.norm_q.weight attn1.norm_q.weight
self_attn.norm_k.weight attn1.norm_k.weight
cross_attn.q.weight attn2.to_q.weight
cross_attn.q.bias attn2.to_q.bias
cross_attn.k.weight attn2.to_k.weight
cross_attn.k.bias attn2.to_k.bias
cross_attn.v.weight attn2.to_v.weight
cross_attn.v.bias attn2.to_v.bias
cross_attn.o.weight attn2.to_out.0.weight
cross_attn.o.bias attn2.to_out.0.bias
cross_attn.norm_q.weight attn2.norm_q.weight
cross_attn.norm_k.weight attn2.norm_k.weight
norm3.weight norm2.weight
norm3.bias norm2.bias
ffn.0.weight ffn.net.0.proj.weight
ffn.0.bias ffn.net.0.proj.bias
ffn.2.weight ffn.net.2.weight
ffn.2.bias ffn.net.2.bias
"""
OUTSIDE = """
patch_embedding.weight patch_embedding.weight
patch_embedding.bias patch_embedding.bias
text_embedding.0.weight condition_embedder.text_embedder.linear_1.weight
text_embedding.0.bias condition_embedder.text_embedder.linear_1.bias
text_embedding.2.weight condition_embedder.text_embedder.linear_2.weight
text_embedding.2.bias condition_embedder.text_embedder.linear_2.bias
time_embedding.0.weight condition_embedder.time_embedder.linear_1.weight
time_embedding.0.bias condition_embedder.time_embedder.linear_1.bias
time_embedding.2.weight condition_embedder.time_embedder.linear_2.weight
time_embedding.2.bias condition_embedder.time_embedder.linear_2.bias
time_projection.1.weight condition_embedder.time_proj.weight
time_projection.1.bias condition_embedder.time_proj.bias
head.head.weight proj_out.weight
head.head.bias proj_out.bias
head.modulation scale_shift_table
"""
IMAGE_LAYER = """
cross_attn.k_img.weight attn2.add_k_proj.weight
cross_attn.k_img.bias attn2.add_k_proj.bias
cross_attn.v_img.weight attn2.add_v_proj.weight
cross_attn.v_img.bias attn2.add_v_proj.bias
cross_attn.norm_k_img.weight attn2.norm_added_k.weight
"""
IMAGE_OUTSIDE = """
img_emb.proj.0.weight condition_embedder.image_embedder.norm1.weight
img_emb.proj.0.bias condition_embedder.image_embedder.norm1.bias
img_emb.proj.1.weight condition_embedder.image_embedder.ff.net.0.proj.weight
img_emb.proj.1.bias condition_embedder.image_embedder.ff.net.0.proj.bias
img_emb.proj.3.weight condition_embedder.image_embedder.ff.net.2.weight
img_emb.proj.3.bias condition_embedder.image_embedder.ff.net.2.bias
img_emb.proj.4.weight condition_embedder.image_embedder.norm2.weight
img_emb.proj.4.bias condition_embedder.image_embedder.norm2.bias
"""
EMB_POS = "img_emb.emb_pos condition_embedder.image_embedder.pos_embed"


def _pairs(text: str, prefix: str = "") -> dict[str, str]:
    rows = (line.split() for line in text.strip().splitlines())
    return {prefix + original: prefix + diffusers for original, diffusers in rows}


def _name_map(*, num_layers: int, image: bool = False) -> dict[str, str]:
    names = _pairs(OUTSIDE) | (_pairs(IMAGE_OUTSIDE) if image else {})
    for index in range(num_layers):
        names |= _pairs(LAYER, f"blocks.{index}.") | (_pairs(IMAGE_LAYER, f"blocks.{index}.") if image else {})
    return names


def _tiny_original(seed: int = 0) -> tuple[dict[str, torch.Tensor], WanTransformer3DModel]:
    """A tiny real transformer and its weights under the original names."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**TINY)
    weights = model.state_dict()
    return {original: weights[new] for original, new in _name_map(num_layers=2).items()}, model


def test_every_name_of_a_real_transformer_is_covered():
    original, model = _tiny_original()
    converted = convert_original_state_dict(original)
    assert len(converted) == 2 * 27 + 15
    fresh = WanTransformer3DModel(**TINY)
    fresh.load_state_dict(converted, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.parametrize("image", [False, True])
def test_names_equal_the_hand_written_table(image):
    names = _name_map(num_layers=3, image=image) | (_pairs(EMB_POS) if image else {})
    tensors = {name: torch.full((1,), float(index)) for index, name in enumerate(names)}
    converted = convert_original_state_dict(tensors)
    assert list(converted) == list(names.values())  # order kept
    assert all(converted[names[name]] is tensor for name, tensor in tensors.items())  # neither copied nor cast


@pytest.mark.parametrize("image", [False, True])
def test_equal_to_diffusers_own_conversion(image):
    names = _name_map(num_layers=12, image=image)  # diffusers' single-file rules leave emb_pos out
    tensors = {name: torch.full((2,), float(index)) for index, name in enumerate(names)}
    theirs = convert_wan_transformer_to_diffusers(dict(tensors))
    ours = convert_original_state_dict(tensors)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)


def test_image_model_loads_strict():
    config = TINY | {"image_dim": 6, "added_kv_proj_dim": 24}
    model = WanTransformer3DModel(**config)
    weights = model.state_dict()
    original = {name: weights[new] for name, new in _name_map(num_layers=2, image=True).items()}
    WanTransformer3DModel(**config).load_state_dict(convert_original_state_dict(original), strict=True)


def test_the_825_true_names_and_shapes():
    folder = GOLDEN / "keys"
    original = json.loads((folder / "wan_1_3b_original_keys.json").read_text())
    expected = json.loads((folder / "wan_1_3b_diffusers_keys.json").read_text())
    converted = convert_original_state_dict({n: torch.empty(s, device="meta") for n, s in original.items()})
    assert len(converted) == 825
    assert {name: list(tensor.shape) for name, tensor in converted.items()} == expected


def test_golden_weights_load_strict():
    files = [file for file in sorted(GOLDEN.glob("*.safetensors")) if file.stem not in ("radial_masks", "rollouts")]
    for file in files:
        with safe_open(file, framework="pt") as archive:
            config = json.loads(archive.metadata()["config"])
            names = [name for name in archive.keys() if name.startswith("model.")]  # noqa: SIM118, not a dict
            weights = {name: archive.get_tensor(name) for name in names}
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=config["num_heads"],
            attention_head_dim=config["dim"] // config["num_heads"],
            in_channels=16,
            out_channels=16,
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"],
        )
        converted = convert_original_state_dict(weights)
        model.load_state_dict(converted, strict=True)
        assert converted == convert_original_state_dict({n.removeprefix("model."): t for n, t in weights.items()})
        assert torch.equal(model.blocks[0].norm2.weight, weights["model.blocks.0.norm3.weight"])
        assert torch.equal(model.scale_shift_table, weights["model.head.modulation"])


def test_diffusers_names_pass_through_and_conversion_is_idempotent():
    original, model = _tiny_original()
    assert convert_original_state_dict(model.state_dict()).keys() == model.state_dict().keys()
    once = convert_original_state_dict(original)
    assert convert_original_state_dict(once) == once
    before = dict(original)
    convert_original_state_dict(original)
    assert original == before  # input untouched


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_wrappers_anywhere_and_order_do_not_matter(data):
    names = _name_map(num_layers=2)
    order = data.draw(st.permutations(list(names)))
    holder = data.draw(st.sampled_from([[], ["model"], ["net"]]))
    wrapped = {}
    for index, name in enumerate(order):
        parts = [*holder, *name.split(".")]
        for _ in range(data.draw(st.integers(0, 3))):
            parts.insert(data.draw(st.integers(0, len(parts) - 1)), data.draw(st.sampled_from(WRAPPERS)))
        wrapped[".".join(parts)] = index
    assert {name: order[index] for name, index in convert_original_state_dict(wrapped).items()} == {
        new: original for original, new in names.items()
    }


@pytest.mark.parametrize(
    ("name", "stripped"),
    [
        ("model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.norm3.bias", "blocks.0.norm3.bias"),
        ("module.module._orig_mod.model.head.modulation", "head.modulation"),
        ("net.blocks.1._checkpoint_wrapped_module.ffn.0.weight", "blocks.1.ffn.0.weight"),
        ("model.model.head.modulation", "model.head.modulation"),  # one holder only
        ("module", ""),
        ("my_module.weight", "my_module.weight"),  # whole components only
    ],
)
def test_strip_wrappers(name, stripped):
    assert strip_wrappers(name) == stripped


def _changed(change) -> dict[str, torch.Tensor]:
    original = {name: torch.zeros(1) for name in _name_map(num_layers=2)}
    change(original)
    return original


def _duplicate(weights):
    weights["model.module.head.head.weight"] = weights["head.head.weight"]


def _both_namings(weights):
    weights["proj_out.weight"] = weights["head.head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"blocks.0.extra.weight": 0}), r"unknown names: 1 \(blocks\.0\.extra\.weight\) of 70"),
        (lambda w: w.update({f"critic.{i}.weight": 0 for i in range(9)}), r"unknown names: 9 \(.* and 4 more\)"),
        (lambda w: w.update({"xblocks.0.modulation": 0}), "unknown names"),
        (lambda w: w.update({"blocks.01.modulation": 0}), "unknown names"),
        (lambda w: w.update({"blocks.0.norm1.weight": 0}), "unknown names"),  # parameter-free in Wan
        (lambda w: w.update({"model.model.head.modulation": 0}), "unknown names"),
        (_duplicate, r"meet after removing wrappers: 2 \(head\.head\.weight, model\.module\.head\.head\.weight\)"),
        (_both_namings, "meet after removing wrappers"),
        (lambda w: w.pop("blocks.1.self_attn.norm_k.weight"), r"missing .*blocks\.1\.attn1\.norm_k\.weight"),
        (lambda w: w.pop("head.modulation"), r"incomplete, missing in diffusers naming: 1 \(scale_shift_table\)"),
        (lambda w: w.update({"blocks.3.modulation": 0}), r"missing in diffusers naming: 53 "),  # gap: block 2
        (lambda w: w.update({"blocks.0.cross_attn.k_img.bias": 0}), "add_k_proj.weight"),  # half an image model
        (lambda w: w.update({"img_emb.proj.4.bias": 0}), r"missing in diffusers naming: 17 "),
        (lambda w: w.clear(), "42"),
        (lambda w: w.update({"generator": {"a": 0}}), r"dictionaries under 1 \(generator\).*generator_ema"),
    ],
)
def test_refusals_name_the_fault(change, message):
    with pytest.raises(ValueError, match=message):
        convert_original_state_dict(_changed(change))


def test_a_naive_replace_chain_would_be_caught():
    """Renaming norm3 alone, as a chained replace in the wrong order does, loses the affine norm."""
    original, _ = _tiny_original()
    wrong = {name.replace("norm3", "norm2").replace("norm2", "norm3"): value for name, value in original.items()}
    naive = {name.replace(".o.", ".to_out.0.").replace("self_attn", "attn1"): v for name, v in wrong.items()}
    with pytest.raises(ValueError, match="unknown names"):
        convert_original_state_dict(naive)
