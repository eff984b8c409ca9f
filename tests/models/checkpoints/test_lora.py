"""Adapters in every naming, merged into both namings, against a sum in float64; what does not fit is refused."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from make_checkpoint import write_family
from safetensors.torch import load_file, save_file

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


def peft(name, _):
    return [f"base_model.model.{name}.lora_{side}.weight" for side in "AB"]


def peft_named(name, _):
    return [f"base_model.model._fsdp_wrapped_module.{name}.lora_{side}.default.weight" for side in "AB"]


def theirs(_, new):
    return [f"transformer.{new}.lora_{side}.weight" for side in "AB"]


def comfy(name, _):
    return [f"diffusion_model.{name}.lora_{side}.weight" for side in ("down", "up")]


def kohya(name, _):
    return [f"lora_unet_{name.replace('.', '_')}.lora_{side}.weight" for side in ("down", "up")]


def named(style, *, alpha=None, dtype=torch.float32):
    tensors = {}
    for name, pair in factors().items():
        names = style(name, TARGETS[name][1])
        tensors |= dict(zip(names, (factor.to(dtype) for factor in pair), strict=True))
        if alpha is not None:
            tensors[names[0].rpartition(".lora_")[0] + ".alpha"] = torch.tensor(alpha)
    return tensors


def expected(weights, *, scale=ALPHA / RANK, dtype=torch.float32):
    """Merged in float64, rounded once."""
    merged = dict(weights)
    for name, (a, b) in factors().items():
        weight = weights[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.double() + scale * b.double() @ a.double()).to(dtype)
    return convert_wan_transformer_to_diffusers(merged)


def convert(path, lora, out, **settings):
    plan = plan_conversion(ConversionRequest(source=path, lora=lora, **settings))
    plan.write(out)
    return plan, WanTransformer3DModel.from_pretrained(out).state_dict()


@pytest.fixture
def base(tmp_path):
    (path,) = write_family(tmp_path / "repository", "self_forcing_ode")
    return path


@pytest.mark.parametrize("style", [peft, peft_named, theirs, comfy, kohya])
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
    for name, weight in merged.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-6)
    unscaled = expected(original, scale=ALPHA)  # the rank forgotten
    name = "blocks.1.attn2.to_k.weight"
    assert (merged[name] - unscaled[name]).abs().max() > 0.1
    assert torch.equal(merged["blocks.0.attn2.to_k.weight"], original["blocks.0.cross_attn.k.weight"])


def test_sums_are_in_float32_and_rounded_once(tmp_path, read_by_hand):
    (path,) = write_family(tmp_path / "repository", "self_forcing_ode", dtype="bfloat16")
    original = read_by_hand(path, "generator")
    lora = tmp_path / "lora.pt"
    torch.save({"generator_lora": named(peft, dtype=torch.bfloat16), "step": 3}, lora)
    rounded = {name: tuple(f.bfloat16().float() for f in pair) for name, pair in factors().items()}
    convert(path, lora, tmp_path / "out", lora_alpha=ALPHA)
    merged = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    differs = False
    for name, (a, b) in rounded.items():
        weight = original[f"{name}.weight"]
        exact = (weight.double() + ALPHA / RANK * b.double() @ a.double()).bfloat16()
        twice = weight.bfloat16() + (ALPHA / RANK * (b.bfloat16() @ a.bfloat16())).bfloat16()
        found = merged[f"{TARGETS[name][1]}.weight"]
        assert found.dtype == torch.bfloat16
        assert (found != exact).float().mean() < 1e-3
        differs = differs or (twice != exact).float().mean() > 0.05
    assert differs


def test_the_alpha(tmp_path, base, monkeypatch):
    from longtake.configs.families import CheckpointRule, ModelFamily
    from longtake.models.checkpoints import converting

    lora = tmp_path / "lora.safetensors"
    save_file(named(kohya, alpha=6.0), lora)
    request = ConversionRequest(source=base, lora=lora)
    assert plan_conversion(request).adapter.scales == [2.0]
    with pytest.raises(ValueError, match="says alpha=6 itself, 9 was given"):
        plan_conversion(ConversionRequest(source=base, lora=lora, lora_alpha=9.0))
    save_file(named(peft), lora)
    with pytest.raises(ValueError, match="does not say its alpha, nor does the preset.*--lora-alpha"):
        plan_conversion(request)
    rule = CheckpointRule(key="generator", lora_key="ema_lora", lora_alpha=12.0)
    monkeypatch.setattr(converting, "load_family", lambda name: ModelFamily(checkpoint=rule))
    with_preset = ConversionRequest(source=base, lora=lora, preset="x")
    assert plan_conversion(with_preset).adapter.scales == [4.0]  # tensors at the top: no entry to choose
    torch.save({"ema_lora": named(peft), "generator_lora": named(theirs)}, lora)
    assert plan_conversion(with_preset).adapter.entry == "ema_lora"
    other = ConversionRequest(source=base, lora=lora, preset="x", lora_key="generator_lora", lora_alpha=3.0)
    assert (plan_conversion(other).adapter.entry, plan_conversion(other).adapter.scales) == ("generator_lora", [1.0])
    with pytest.raises(ValueError, match="without an adapter"):
        plan_conversion(ConversionRequest(source=base, lora_alpha=3.0))


def _change(edit):
    tensors = named(peft)
    edit(tensors)
    return tensors


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
    "a model": (lambda t: (t.clear(), t.update({"blocks.0.modulation": torch.zeros(1, 6, 24)})), "unknown names"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_refused(name, tmp_path, base):
    edit, message = FAULTS[name]
    lora = tmp_path / "lora.pt"
    torch.save({"generator_lora": _change(edit)}, lora)
    with pytest.raises(ValueError, match=message):
        plan_conversion(ConversionRequest(source=base, lora=lora, lora_alpha=ALPHA))


def test_factors_that_are_not_finite(tmp_path, base):
    lora = tmp_path / "lora.pt"
    torch.save(_change(lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan"))), lora)
    with pytest.raises(ValueError, match=r"NaN or infinity.*blocks\.0\.attn1\.to_q\.weight"):
        convert(base, lora, tmp_path / "out", lora_alpha=ALPHA)
    assert not (tmp_path / "out").exists()
