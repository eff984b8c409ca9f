"""Adapters in every naming, merged into both namings, against a sum in float64; what does not fit is refused."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from make_checkpoint import write_family
from safetensors.torch import load_file, save_file

from longtake.configs.families import ModelFamily, _CheckpointRule
from longtake.models.checkpoints import converting
from longtake.models.checkpoints.converting import ConversionRequest, plan_conversion

RANK, ALPHA = 3, 5.0
# Original module, its shape (out, in), its name in diffusers; written by hand.
TARGETS = {
    "blocks.0.self_attn.q": ((24, 24), "blocks.0.attn1.to_q"),
    "blocks.0.self_attn.o": ((24, 24), "blocks.0.attn1.to_out.0"),
    "blocks.1.cross_attn.k": ((24, 24), "blocks.1.attn2.to_k"),
    "blocks.1.ffn.0": ((32, 24), "blocks.1.ffn.net.0.proj"),
    "blocks.1.ffn.2": ((24, 32), "blocks.1.ffn.net.2"),
    "time_projection.1": ((144, 24), "condition_embedder.time_proj"),
}


def factors():
    generator = torch.Generator().manual_seed(3)
    return {
        name: (torch.randn(RANK, inner, generator=generator), torch.randn(outer, RANK, generator=generator))
        for name, ((outer, inner), _) in TARGETS.items()
    }


STYLES = {
    "peft": "base_model.model.{name}.lora_{side}.weight",
    "named": "base_model.model._fsdp_wrapped_module.{name}.lora_{side}.default.weight",
    "diffusers": "transformer.{new}.lora_{side}.weight",
    "comfy": "diffusion_model.{name}.lora_{way}.weight",
    "kohya": "lora_unet_{flat}.lora_{way}.weight",
}


def named(style="peft", *, alpha=None, dtype=torch.float32):
    tensors = {}
    for name, pair in factors().items():
        for factor, side, way in zip(pair, "AB", ("down", "up"), strict=True):
            words = {"name": name, "new": TARGETS[name][1], "flat": name.replace(".", "_"), "side": side, "way": way}
            stored = STYLES[style].format(**words)
            tensors[stored] = factor.to(dtype)
            if alpha is not None:
                tensors[stored.rpartition(".lora_")[0] + ".alpha"] = torch.tensor(alpha)
    return tensors


def expected(weights, *, scale=ALPHA / RANK):
    """Merged in float64, rounded once."""
    merged = dict(weights)
    for name, (a, b) in factors().items():
        weight = weights[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.double() + scale * b.double() @ a.double()).float()
    return convert_wan_transformer_to_diffusers(merged)


def convert(path, lora, out, **settings):
    plan = plan_conversion(ConversionRequest(source=path, lora=lora, **settings))
    plan.write(out)
    return plan, WanTransformer3DModel.from_pretrained(out).state_dict()


@pytest.fixture
def base(tmp_path):
    (path,) = write_family(tmp_path / "repository", "self_forcing_ode")
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", ["self_forcing_ode", "diffusers"])
def test_every_naming_merges_into_both(style, family, tmp_path, base, read_by_hand):
    original = read_by_hand(base, "generator")
    path = base
    if family == "diffusers":
        path = tmp_path / "theirs" / "model.safetensors"
        path.parent.mkdir()
        save_file({n: t.contiguous() for n, t in convert_wan_transformer_to_diffusers(dict(original)).items()}, path)
        (path.parent / "config.json").write_text((base.parent / "config.json").read_text())
    lora = tmp_path / "lora.safetensors"
    save_file(named(style), lora)
    plan, merged = convert(path, lora, tmp_path / "out", lora_alpha=ALPHA)
    assert (len(plan.adapter.pairs), plan.adapter.ranks, plan.adapter.scales) == (6, [RANK], [ALPHA / RANK])
    wanted = expected(original)
    torch.testing.assert_close(merged, wanted, rtol=1e-6, atol=1e-6)
    unscaled = expected(original, scale=ALPHA)  # the rank forgotten
    name = "blocks.1.attn2.to_k.weight"
    assert (merged[name] - unscaled[name]).abs().max() > 0.1
    assert torch.equal(merged["blocks.0.attn2.to_k.weight"], original["blocks.0.cross_attn.k.weight"])


def test_sums_are_in_float32_and_rounded_once(tmp_path, read_by_hand):
    (path,) = write_family(tmp_path / "repository", "self_forcing_ode", dtype="bfloat16")
    original = read_by_hand(path, "generator")
    lora = tmp_path / "lora.pt"
    torch.save({"generator_lora": named(dtype=torch.bfloat16), "step": 3}, lora)
    rounded = {name: tuple(f.bfloat16().float() for f in pair) for name, pair in factors().items()}
    convert(path, lora, tmp_path / "out", lora_alpha=ALPHA)
    merged = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    differs = []
    for name, (a, b) in rounded.items():
        weight = original[f"{name}.weight"]
        exact = (weight.double() + ALPHA / RANK * b.double() @ a.double()).bfloat16()
        twice = weight.bfloat16() + (ALPHA / RANK * (b.bfloat16() @ a.bfloat16())).bfloat16()
        found = merged[f"{TARGETS[name][1]}.weight"]
        assert found.dtype == torch.bfloat16
        assert (found != exact).float().mean() < 1e-3
        differs.append((twice != exact).float().mean() > 0.05)
    assert any(differs)


def test_the_alpha(tmp_path, base, monkeypatch):
    lora = tmp_path / "lora.safetensors"

    def found(**settings):
        adapter = plan_conversion(ConversionRequest(source=base, lora=lora, **settings)).adapter
        return adapter.entry, adapter.scales

    save_file(named("kohya", alpha=6.0), lora)
    assert found() == ("", [2.0])
    with pytest.raises(ValueError, match="says alpha=6 itself, 9 was given"):
        found(lora_alpha=9.0)
    save_file(named(), lora)
    with pytest.raises(ValueError, match="does not say its alpha, nor does the preset.*--lora-alpha"):
        found()
    rule = _CheckpointRule(key="generator", lora_key="ema_lora", lora_alpha=12.0)
    monkeypatch.setattr(converting, "load_family", lambda name: ModelFamily(checkpoint=rule))
    assert found(preset="x") == ("", [4.0])  # tensors at the top: no entry to choose
    torch.save({"ema_lora": named(), "generator_lora": named("diffusers")}, lora)
    assert found(preset="x") == ("ema_lora", [4.0])
    assert found(preset="x", lora_key="generator_lora", lora_alpha=3.0) == ("generator_lora", [1.0])
    with pytest.raises(ValueError, match="without an adapter"):
        plan_conversion(ConversionRequest(source=base, lora_alpha=3.0))


Q = "base_model.model.blocks.0.self_attn.q"
FAULTS = {
    "no partner": (lambda t: t.pop(f"{Q}.lora_B.weight"), r"without their partner: 1 \(.*lora_A.weight\)"),
    "no target": (
        lambda t: t.update({f"base_model.model.blocks.7.ffn.0.lora_{s}.weight": torch.zeros(3, 3) for s in "AB"}),
        r"changes what the model has not.*: 2 \(.*blocks\.7",
    ),
    "unknown": (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(24)}), "unknown names: 1 "),
    "bias": (lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(24)}), "unknown names: 1 "),
    "transposed": (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(24, 3)}), r"does not fit .*is \[24, 3\]"),
    "ranks": (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 24)}), "does not fit"),
    "target's shape": (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(32, 3)}), r"of shape \[24, 24\]"),
    "two adapters": (lambda t: t.update({f"{Q}.lora_A.b.weight": torch.zeros(3, 24)}), "several factors"),
    "integers": (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 24).int()}), "quantised"),
    "not finite": (
        lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")),
        r"NaN or infinity.*blocks\.0\.attn1\.to_q\.weight",
    ),
    "a model": (lambda t: (t.clear(), t.update({"blocks.0.modulation": torch.zeros(1, 6, 24)})), "unknown names"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_refused(name, tmp_path, base):
    edit, message = FAULTS[name]
    tensors = named()
    edit(tensors)
    torch.save({"generator_lora": tensors}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=message):
        convert(base, tmp_path / "lora.pt", tmp_path / "out", lora_alpha=ALPHA)
    assert not (tmp_path / "out").exists()
