"""VAE and text encoder of Wan's own files, names against the classes and diffusers' rules; whole folders that open."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import SIZES
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch.nn import functional as F
from transformers import UMT5Config, UMT5EncoderModel

from longtake.configs.families import ModelFamily
from longtake.models.checkpoints import converting
from longtake.models.checkpoints.converting import ConversionRequest, plan_conversion
from longtake.models.checkpoints.files import TensorInfo, open_checkpoint
from longtake.models.checkpoints.wan_parts import _converted_part, find_part
from longtake.pipelines.loading import check_model_folder

KEYS = Path(__file__).resolve().parents[2] / "golden" / "keys" / "wan_vae_original_keys.json"
REAL_VAE = {name: tuple(shape) for name, shape in json.loads(KEYS.read_text()).items()}
# Widths are multiples of 96 in the published file, of 2 here.
VAE = {name: tuple(n // 48 if n % 96 == 0 else n for n in shape) for name, shape in REAL_VAE.items()}


def original_text_encoder(vocab, dim, inner, ff, layers, heads, buckets=32):
    shapes = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.norm1.weight": (dim,), f"blocks.{i}.norm2.weight": (dim,)}
        shapes |= {f"blocks.{i}.attn.{x}.weight": (inner, dim) for x in "qkv"}
        shapes |= {f"blocks.{i}.attn.o.weight": (dim, inner), f"blocks.{i}.ffn.fc2.weight": (dim, ff)}
        shapes |= {f"blocks.{i}.ffn.{x}.weight": (ff, dim) for x in ("gate.0", "fc1")}
        shapes |= {f"blocks.{i}.pos_embedding.embedding.weight": (buckets, heads)}
    return shapes


TEXT = original_text_encoder(vocab=42, dim=32, inner=32, ff=64, layers=2, heads=4)


def infos(shapes, dtype=torch.float32):
    return {"": {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}}


def numbers(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def loaded(name, model_class, weights, tmp_path):
    """The part of a file with these weights, converted and read by its own library."""
    torch.save(weights, tmp_path / "weights.pth")
    (tmp_path / name).mkdir(exist_ok=True)
    find_part(name, tmp_path / "weights.pth").write(tmp_path / name)
    model, info = model_class.from_pretrained(tmp_path / name, output_loading_info=True)
    assert not any(info.values()), info
    return model


def test_the_real_vae_has_the_names_of_both_worlds(header_only):
    part = _converted_part("vae", header_only(infos(REAL_VAE)))
    with torch.device("meta"):
        model = AutoencoderKLWan()
    assert {t.name: t.info.shape for t in part.tensors} == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    found, wanted = ({k: v for k, v in c.items() if k[0] != "_"} for c in (part.config, model.config))
    assert len(REAL_VAE) == 194 and found == wanted


def test_a_tiny_vae_file_loads_and_decodes(tmp_path):
    weights = numbers(VAE)
    model = loaded("vae", AutoencoderKLWan, weights, tmp_path)
    assert model.decode(torch.randn(1, 16, 2, 4, 4)).sample.isfinite().all()
    weights["decoder.upsamples.9.residual.1.gamma"] = weights.pop("decoder.upsamples.4.residual.0.gamma")
    with pytest.raises(ValueError, match="missing: 1 .*; extra: 1"):
        loaded("vae", AutoencoderKLWan, weights, tmp_path)


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
    weights = numbers(TEXT)
    model = loaded("text_encoder", UMT5EncoderModel, weights, tmp_path)
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


def without(shapes, name):
    return {key: shape for key, shape in shapes.items() if key != name}


WRONG_PARTS = [
    ("vae", VAE | {"conv2.weight": (48, 48, 1, 1, 1)}, "VAE of Wan2.2-TI2V-5B"),
    ("vae", VAE | {"conv2.weight": (4,)}, "4 latent channels, whose mean and deviation are not published"),
    ("vae", VAE | {"decoder.conv1.weight": (16, 8, 3, 3, 3)}, r"1 misshapen: decoder.conv_in.weight is \[16, 8, 3"),
    ("vae", VAE | {"module.conv2.bias": (16,)}, "which are one without wrappers"),
    ("vae", VAE | {"quant_conv.bias": (32,)}, r"under two names: 1 \(conv1.bias\)"),
    ("vae", without(VAE, "decoder.head.2.bias"), r"missing: 1 \(decoder.conv_out.bias\)"),
    ("vae", without(VAE, "conv2.weight"), "complete Wan VAE: it lacks 'conv2.weight'"),
    ("vae", TEXT, "is a UMT5 text encoder; --vae takes"),
    ("text_encoder", TEXT | {"blocks.0.ffn.fc3.weight": (1,)}, "extra: 1 "),
    ("text_encoder", without(TEXT, "blocks.1.attn.v.weight"), r"missing: 1 \(.*SelfAttention.v"),
    ("text_encoder", without(TEXT, "token_embedding.weight"), "no complete UMT5 text encoder: 'token_embedd"),
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
    assert {file.name for file in find_part("tokenizer", tiny_folder).files} >= {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_an_image_model_is_converted_alone(tmp_path, request_of_all):
    config = SIZES["tiny"] | {"image_dim": 6, "added_kv_proj_dim": 24, "pos_embed_seq_len": 10, "in_channels": 9}
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
