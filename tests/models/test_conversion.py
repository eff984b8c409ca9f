"""Original Wan names to diffusers names: the true 825 names, golden weights, diffusers' own rules, and refusals."""

import json
import random
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
ORIGINAL, DIFFUSERS = (
    json.loads((GOLDEN / "keys" / f"wan_1_3b_{side}_keys.json").read_text()) for side in ("original", "diffusers")
)
WRAPPERS = ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
IMAGE_BLOCK = ["k_img.weight", "k_img.bias", "v_img.weight", "v_img.bias", "norm_k_img.weight"]
IMAGE_OUTSIDE = [f"img_emb.proj.{layer}.{kind}" for layer in (0, 1, 3, 4) for kind in ("weight", "bias")]
# Of first-and-last-frame models; diffusers' single-file rules leave it out.
POSITIONS = ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed")


def _names(num_layers: int, *, image: bool = False) -> list[str]:
    """Original names of a model with the first layers of the published one."""
    names = [name for name in ORIGINAL if not name.startswith("blocks.") or int(name.split(".")[1]) < num_layers]
    if image:
        names += [f"blocks.{index}.cross_attn.{name}" for index in range(num_layers) for name in IMAGE_BLOCK]
        names += IMAGE_OUTSIDE
    return names


def _theirs(names: list[str]) -> dict[str, str]:
    """Diffusers' own renaming, new name to original."""
    return convert_wan_transformer_to_diffusers({name: name for name in names})


@pytest.mark.parametrize("image", [False, True])
def test_equal_to_diffusers_own_conversion(image):
    names = _names(12, image=image)
    expected = _theirs(names) | ({POSITIONS[1]: POSITIONS[0]} if image else {})
    names += [POSITIONS[0]] if image else []
    tensors = {name: torch.full((2,), float(index)) for index, name in enumerate(names)}
    before = dict(tensors)
    ours = convert_original_state_dict(tensors)
    assert ours.keys() == expected.keys()
    assert all(ours[name] is tensors[original] for name, original in expected.items())  # neither copied nor cast
    assert list(map(id, ours.values())) == list(map(id, tensors.values()))  # order kept
    assert convert_original_state_dict(ours) == ours and tensors == before


def test_an_image_model_loads_strict(make_transformer):
    config = {"image_dim": 6, "added_kv_proj_dim": 48}
    weights = make_transformer(**config).state_dict()
    original = {name: weights[new] for new, name in _theirs(_names(2, image=True)).items()}
    make_transformer(**config).load_state_dict(convert_original_state_dict(original), strict=True)


def test_the_825_true_names_and_shapes():
    converted = convert_original_state_dict({n: torch.empty(s, device="meta") for n, s in ORIGINAL.items()})
    assert len(converted) == 825
    assert {name: list(tensor.shape) for name, tensor in converted.items()} == DIFFUSERS


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


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 2**32), holder=st.sampled_from([[], ["model"], ["net"]]))
def test_wrappers_anywhere_and_order_do_not_matter(seed, holder):
    draw = random.Random(seed)
    names = _names(2)
    wrapped = {}
    for name in draw.sample(names, len(names)):
        parts = [*holder, *name.split(".")]
        for _ in range(draw.randint(0, 3)):
            parts.insert(draw.randrange(len(parts)), draw.choice(WRAPPERS))
        wrapped[".".join(parts)] = name
    assert convert_original_state_dict(wrapped) == _theirs(names)


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


def _changed(change) -> dict[str, int]:
    original = dict.fromkeys(_names(2), 0)
    change(original)
    return original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"blocks.0.extra.weight": 0}), r"unknown names: 1 \(blocks\.0\.extra\.weight\) of 70"),
        (lambda w: w.update({f"critic.{i}.weight": 0 for i in range(9)}), r"unknown names: 9 \(.* and 4 more\)"),
        (lambda w: w.update({"xblocks.0.modulation": 0}), "unknown names"),
        (lambda w: w.update({"blocks.01.modulation": 0}), "unknown names"),
        (lambda w: w.update({"blocks.0.norm1.weight": 0}), "unknown names"),  # parameter-free in Wan
        (lambda w: w.update({"model.model.head.modulation": 0}), "unknown names"),
        (
            lambda w: w.update({"model.module.head.head.weight": 0}),
            r"meet after removing wrappers: 2 \(head\.head\.weight, model\.module\.head\.head\.weight\)",
        ),
        (lambda w: w.update({"proj_out.weight": 0}), "meet after removing wrappers"),
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
    wrong = [name.replace("norm3", "norm2").replace("norm2", "norm3") for name in _names(2)]
    naive = {name.replace(".o.", ".to_out.0.").replace("self_attn", "attn1"): 0 for name in wrong}
    with pytest.raises(ValueError, match="unknown names"):
        convert_original_state_dict(naive)
