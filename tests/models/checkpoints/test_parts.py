"""VAE and text encoder of Wan's own files, names against the classes and diffusers' rules; whole folders that open."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch.nn import functional as F
from transformers import UMT5Config, UMT5EncoderModel

from longtake.configs.families import ModelFamily
from longtake.models.checkpoints import converting
from longtake.models.checkpoints.converting import ConversionRequest, plan_conversion
from longtake.models.checkpoints.files import TensorInfo
from longtake.models.checkpoints.wan_parts import (
    _converted_part,
    find_part,
    find_tokenizer,
)

REAL_VAE = {"base": 96, "mult": [1, 2, 4, 4], "blocks": 2, "temporal": [False, True, True]}
TINY_VAE = REAL_VAE | {"base": 2}


def residual(name, inner, outer):
    shapes = {f"{name}.residual.0.gamma": (inner, 1, 1, 1), f"{name}.residual.3.gamma": (outer, 1, 1, 1)}
    shapes |= convolution(f"{name}.residual.2", outer, inner, 3, 3, 3)
    shapes |= convolution(f"{name}.residual.6", outer, outer, 3, 3, 3)
    return shapes | (convolution(f"{name}.shortcut", outer, inner, 1, 1, 1) if inner != outer else {})


def convolution(name, outer, *shape):
    return {f"{name}.weight": (outer, *shape), f"{name}.bias": (outer,)}


def middle(name, dim):
    shapes = residual(f"{name}.middle.0", dim, dim) | residual(f"{name}.middle.2", dim, dim)
    shapes |= convolution(f"{name}.middle.1.to_qkv", 3 * dim, dim, 1, 1)
    shapes |= convolution(f"{name}.middle.1.proj", dim, dim, 1, 1)
    return shapes | {f"{name}.middle.1.norm.gamma": (dim, 1, 1)}


def head(name, dim, outer):
    return {f"{name}.head.0.gamma": (dim, 1, 1, 1)} | convolution(f"{name}.head.2", outer, dim, 3, 3, 3)


def stages(name, dims, blocks, *, halved, temporal):
    """Residual blocks of each stage, and the resampler behind all but the last."""
    shapes, index = {}, 0
    for stage, (inner, outer) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        inner = inner // 2 if halved and stage else inner
        for _ in range(blocks):
            shapes |= residual(f"{name}.{index}", inner, outer)
            inner, index = outer, index + 1
        if stage < len(temporal):
            shapes |= convolution(f"{name}.{index}.resample.1", outer // 2 if halved else outer, outer, 3, 3)
            if temporal[stage]:
                shapes |= convolution(f"{name}.{index}.time_conv", 2 * outer if halved else outer, outer, 3, 1, 1)
            index += 1
    return shapes


def original_vae(base, mult, blocks, temporal, z=16):
    """Names and shapes as Wan's own VAE lays its layers out, one after another."""
    down, up = [base * m for m in [1, *mult]], [base * m for m in [mult[-1], *mult[::-1]]]
    shapes = convolution("conv1", 2 * z, 2 * z, 1, 1, 1) | convolution("conv2", z, z, 1, 1, 1)
    shapes |= convolution("encoder.conv1", down[0], 3, 3, 3, 3)
    shapes |= stages("encoder.downsamples", down, blocks, halved=False, temporal=temporal)
    shapes |= middle("encoder", down[-1]) | head("encoder", down[-1], 2 * z)
    shapes |= convolution("decoder.conv1", up[0], z, 3, 3, 3) | middle("decoder", up[0])
    shapes |= stages("decoder.upsamples", up, blocks + 1, halved=True, temporal=temporal[::-1])
    return shapes | head("decoder", up[-1], 3)


def original_text_encoder(vocab, dim, inner, ff, layers, heads, buckets=32):
    shapes = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.norm1.weight": (dim,), f"blocks.{i}.norm2.weight": (dim,)}
        shapes |= {f"blocks.{i}.attn.{x}.weight": (inner, dim) for x in "qkv"}
        shapes |= {f"blocks.{i}.attn.o.weight": (dim, inner), f"blocks.{i}.ffn.fc2.weight": (dim, ff)}
        shapes |= {f"blocks.{i}.ffn.{x}.weight": (ff, dim) for x in ("gate.0", "fc1")}
        shapes |= {f"blocks.{i}.pos_embedding.embedding.weight": (buckets, heads)}
    return shapes


TINY_T5 = {"vocab": 42, "dim": 32, "inner": 32, "ff": 64, "layers": 2, "heads": 4}


def infos(shapes, dtype=torch.float32):
    return {"": {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}}


def numbers(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_real_vae_has_the_names_of_both_worlds(header_only):
    shapes = original_vae(**REAL_VAE)
    part = _converted_part("vae", header_only(infos(shapes)))
    with torch.device("meta"):
        model = AutoencoderKLWan()
    assert {t.name: t.info.shape for t in part.tensors} == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert len(shapes) == 194
    assert {k: v for k, v in part.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }


def test_a_tiny_vae_file_loads_and_decodes(tmp_path):
    shapes = original_vae(**TINY_VAE)
    weights = numbers(shapes)
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(weights, path)
    part = find_part("vae", path)
    (tmp_path / "vae").mkdir()
    part.write(tmp_path / "vae")
    model, info = AutoencoderKLWan.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(info.values()), info
    assert model.decode(torch.randn(1, 16, 2, 4, 4)).sample.isfinite().all()
    weights["decoder.upsamples.9.residual.1.gamma"] = weights.pop("decoder.upsamples.4.residual.0.gamma")
    torch.save(weights, path)
    with pytest.raises(ValueError, match="missing: 1 .*; extra: 1"):
        find_part("vae", path)


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def buckets(length):
    """T5's 32 buckets of signed distance, exact to 8, logarithmic to 128."""
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    far = 8 + (torch.log(distance.abs().clamp(min=1) / 8) / torch.log(torch.tensor(128 / 8)) * 8).long()
    return torch.where(distance > 0, 16, 0) + torch.where(distance.abs() < 8, distance.abs(), far.clamp(max=15))


def wan_text_encoder(w, tokens, *, layers, heads):
    """The network of Wan's own file by its own names; gate is the factor with the activation."""
    x = w["token_embedding.weight"][tokens]
    for i in range(layers):
        b = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        y = rms(x, b["norm1.weight"])
        q, k, v = ((y @ b[f"attn.{n}.weight"].T).unflatten(-1, (heads, -1)).transpose(0, 1) for n in "qkv")
        bias = b["pos_embedding.embedding.weight"][buckets(len(tokens))].permute(2, 0, 1)
        y = ((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + y @ b["attn.o.weight"].T
        y = rms(x, b["norm2.weight"])
        y = (y @ b["ffn.fc1.weight"].T) * F.gelu(y @ b["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + y @ b["ffn.fc2.weight"].T
    return rms(x, w["norm.weight"])


def test_a_tiny_text_encoder_gives_the_same_numbers(tmp_path):
    shapes = original_text_encoder(**TINY_T5)
    weights = numbers(shapes)
    path = tmp_path / "models_t5.pth"
    torch.save(weights, path)
    (tmp_path / "text_encoder").mkdir()
    find_part("text_encoder", path).write(tmp_path / "text_encoder")
    model, info = UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(model.encoder.embed_tokens.weight, weights["token_embedding.weight"])
    tokens = torch.arange(20) * 2
    with torch.no_grad():
        found = model(tokens[None]).last_hidden_state[0]
    wanted = wan_text_encoder(weights, tokens, layers=2, heads=4)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    swapped = {n.replace("fc1", "x").replace("gate.0", "fc1").replace("x", "gate.0"): t for n, t in weights.items()}
    assert (wan_text_encoder(swapped, tokens, layers=2, heads=4) - wanted).abs().max() > 0.01


def test_the_real_text_encoder_has_the_names_of_transformers(header_only):
    shapes = original_text_encoder(vocab=256384, dim=4096, inner=4096, ff=10240, layers=24, heads=64)
    part = _converted_part("text_encoder", header_only(infos(shapes, torch.bfloat16)))
    # google/umt5-xxl's published configuration.
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items() if n != "encoder.embed_tokens.weight"}
    assert {tensor.name: tensor.info.shape for tensor in part.tensors} == wanted and len(wanted) == 242
    assert part.config["dtype"] == "bfloat16" and part.config["architectures"] == ["UMT5EncoderModel"]
    assert part.config["dense_act_fn"] == "gelu_new"


VAE, TEXT = original_vae(**TINY_VAE), original_text_encoder(**TINY_T5)
WRONG_PARTS = [
    ("vae", VAE | {"conv2.weight": (48, 48, 1, 1, 1)}, "VAE of Wan2.2-TI2V-5B"),
    ("vae", VAE | {"conv2.weight": (4,)}, "4 latent channels, whose mean and deviation are not published"),
    ("vae", VAE | {"decoder.conv1.weight": (16, 8, 3, 3, 3)}, r"1 misshapen: decoder.conv_in.weight is \[16, 8, 3"),
    ("vae", VAE | {"module.conv2.bias": (16,)}, "which are one without wrappers"),
    ("vae", VAE | {"quant_conv.bias": (32,)}, r"under two names: 1 \(conv1.bias\)"),
    ("vae", {n: s for n, s in VAE.items() if n != "decoder.head.2.bias"}, r"missing: 1 \(decoder.conv_out.bias\)"),
    ("vae", {n: s for n, s in VAE.items() if n != "conv2.weight"}, "complete Wan VAE: it lacks 'conv2.weight'"),
    ("vae", TEXT, "is a UMT5 text encoder; --vae takes"),
    ("text_encoder", TEXT | {"blocks.0.ffn.fc3.weight": (1,)}, "extra: 1 "),
    (
        "text_encoder",
        {n: s for n, s in TEXT.items() if n != "blocks.1.attn.v.weight"},
        r"missing: 1 \(.*SelfAttention.v",
    ),
    ("text_encoder", {n: s for n, s in TEXT.items() if n[0] != "t"}, "no complete UMT5 text encoder: 'token_embedd"),
    ("text_encoder", VAE, "is a Wan VAE; --text-encoder takes"),
]


@pytest.mark.parametrize(("name", "shapes", "message"), WRONG_PARTS)
def test_files_that_are_no_such_part_are_refused(name, shapes, message, header_only):
    with pytest.raises(ValueError, match=message):
        _converted_part(name, header_only(infos(shapes)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vae", "is no Wan VAE: its config.json says 'WanTransformer3DModel'"),
        ("text_encoder", "is no UMT5 text encoder"),
    ],
)
def test_folders_of_other_parts_and_their_bare_files_are_refused(name, message, tiny_folder):
    with pytest.raises(ValueError, match="naming: give its folder"):
        find_part(name, next((tiny_folder / name).glob("*.safetensors")))
    with pytest.raises(ValueError, match=message):
        find_part(name, tiny_folder / "transformer")


@pytest.fixture
def request_of_all(tiny_folder):
    """The tiny pipeline's own transformer, with its other folders."""
    parts = {part: tiny_folder / part for part in ("vae", "text_encoder", "tokenizer")}
    return {"source": tiny_folder / "transformer"} | parts


def test_a_whole_folder_opens_and_runs(request_of_all, tiny_folder, tmp_path, monkeypatch):
    family = ModelFamily(sampler={"name": "few_step", "timesteps": [1000, 500], "flow_shift": 7.0})
    monkeypatch.setattr(converting, "load_family", lambda name: family)
    out = tmp_path / "folder"
    plan = plan_conversion(ConversionRequest(**request_of_all, preset="x"))
    assert plan.is_pipeline
    plan.write(out)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["model_index.json", "conversion.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    )
    ours, theirs = (WanPipeline.from_pretrained(folder) for folder in (out, tiny_folder))
    assert ours.scheduler.config.shift == 7.0 and ours.scheduler.config.stochastic_sampling
    ours.scheduler = theirs.scheduler
    settings = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    videos = []
    for pipe in (ours, theirs):
        torch.manual_seed(0)  # of all numbers: stochastic sampling draws some of its own
        videos.append(pipe("a red circle", max_sequence_length=16, **settings).frames)
    assert torch.allclose(*videos, atol=1e-5)
    from longtake.models.checkpoints.files import open_checkpoint
    from longtake.pipelines.loading import check_model_folder

    check_model_folder(out)
    assert len(open_checkpoint(out).entries[""]) == 69  # a pipeline's folder stands for its transformer
    weights = next((out / "vae").glob("*.safetensors"))
    assert weights.stat().st_ino == next((tiny_folder / "vae").glob("*.safetensors")).stat().st_ino  # linked


def test_a_multi_step_family_gets_a_plain_scheduler(request_of_all, tmp_path, monkeypatch):
    family = ModelFamily(sampler={"name": "multi_step", "flow_shift": 3.0})
    monkeypatch.setattr(converting, "load_family", lambda name: family)
    plan_conversion(ConversionRequest(**request_of_all, preset="x")).write(tmp_path / "a")
    plan_conversion(ConversionRequest(**request_of_all)).write(tmp_path / "b")
    for name, shift in (("a", 3.0), ("b", 5.0)):
        config = json.loads((tmp_path / name / "scheduler" / "scheduler_config.json").read_text())
        assert (config["shift"], config["stochastic_sampling"]) == (shift, False)


def test_parts_that_do_not_fit_are_refused(request_of_all, tiny_folder, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            plan_conversion(ConversionRequest(**(request_of_all | changes)))

    refused("needs --text-encoder and --tokenizer too", text_encoder=None, tokenizer=None)
    refused("holds no tokenizer", tokenizer=tiny_folder / "vae")
    refused("is no folder; --tokenizer takes one", tokenizer=tmp_path / "none")
    refused("does not exist", vae=tmp_path / "none")
    refused("has no config.json", vae=tmp_path)
    other = tmp_path / "vae"
    shutil.copytree(tiny_folder / "vae", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"z_dim": 16}))
    refused("--vae has 16 latent channels, the transformer takes 4", vae=other)
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    refused("truncated", vae=other)
    weights.rename(weights.with_suffix(".bin"))
    refused("holds no .safetensors weights; pickles are not taken", vae=other)
    assert find_part("vae", tiny_folder).files == find_part("vae", tiny_folder / "vae").files
    assert {file.name for file in find_tokenizer(tiny_folder).files} >= {"tokenizer.json", "tokenizer_config.json"}


def test_an_image_model_is_converted_alone(tmp_path, request_of_all, tiny_config):
    from diffusers import WanTransformer3DModel

    config = tiny_config | {"image_dim": 6, "added_kv_proj_dim": 24, "pos_embed_seq_len": 10, "in_channels": 9}
    model = WanTransformer3DModel(**config)
    model.save_pretrained(tmp_path / "theirs")
    plan = plan_conversion(ConversionRequest(source=tmp_path / "theirs"))
    assert plan.transformer.is_image_to_video
    plan.write(tmp_path / "ours")
    found, info = WanTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and found.config.pos_embed_seq_len == 10 and found.config.image_dim == 6
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="image-to-video model, whose pipeline needs an image encoder"):
        plan_conversion(ConversionRequest(**(request_of_all | {"source": tmp_path / "theirs"})))
