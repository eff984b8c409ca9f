"""Models by preset and folder, or part by part; what does not fit is refused before a weight is loaded."""

import json
import shutil
from dataclasses import replace
from enum import StrEnum

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.quantizers import auto as quantizers
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from rollouts import make_video

from longtake.configs.families import load_family
from longtake.pipelines import LongVideoPipeline, loading

TINY = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 96}


def load(*arguments, **settings):
    return LongVideoPipeline.from_pretrained(*arguments, **settings)


def run(pipe, **settings):
    return make_video(pipe, **{"num_frames": 21, "height": 32, "width": 32} | settings)


@pytest.fixture
def tiny_preset(monkeypatch):
    """The preset self_forcing as if its model were of the tiny folder's size."""
    family = replace(load_family("self_forcing"), max_sequence_length=16)
    monkeypatch.setattr(loading, "load_family", lambda name: family)
    monkeypatch.setitem(loading.TRANSFORMERS, "1.3B", TINY)
    monkeypatch.setattr(loading, "WAN21_CHANNELS", 4)
    return family


@pytest.fixture
def copy_of(tiny_folder, tmp_path):
    """Copies the tiny folder and changes entries of one of its config files."""

    def copy(file=None, **entries):
        folder = tmp_path / "copy"
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
        if file is not None:
            path = folder / file
            path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return folder

    return copy


def test_a_preset_and_a_folder(tiny_preset, tiny_folder, tiny_pipe):
    by_both = load("self_forcing", tiny_folder)
    assert by_both.family == tiny_preset
    by_family = load(tiny_folder, family="self_forcing")
    alone = load(tiny_folder)
    video = run(by_both)
    for other in (by_family, alone):
        assert other.family == tiny_preset and torch.equal(run(other), video)
    assert not torch.equal(run(tiny_pipe), video), "the tiny family has two steps, the preset four"


def test_parts_one_by_one_as_objects_or_folders(tiny_preset, tiny_folder):
    whole = load("self_forcing", tiny_folder)
    video = run(whole)
    parts = {part: tiny_folder / part for part in ("transformer", "vae", "text_encoder", "tokenizer")}
    assert torch.equal(run(load("self_forcing", **parts)), video)
    objects = {part: whole.components[part] for part in parts}
    assert torch.equal(run(load("self_forcing", **objects)), video)

    # A part of one's own in a folder that has the others, which need not have that one.
    torch.manual_seed(1)
    vae = AutoencoderKLWan.from_config(whole.vae.config).eval()
    mixed = load("self_forcing", tiny_folder, vae=vae, transformer=parts["transformer"])
    assert mixed.vae is vae
    assert not torch.equal(run(mixed), video)
    assert torch.equal(run(mixed, output_type="latent"), run(whole, output_type="latent"))


def test_a_part_may_be_missing_from_the_folder_if_it_is_given(tiny_preset, copy_of, tiny_folder):
    folder = copy_of()
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="holds no .safetensors"):
        load("self_forcing", folder)
    pipe = load("self_forcing", folder, vae=tiny_folder / "vae")
    assert torch.equal(run(pipe), run(load("self_forcing", tiny_folder, device_map="cpu")))


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_a_type_for_folders_and_parts(tiny_preset, tiny_folder, keyword):
    for parts in ({}, {"transformer": tiny_folder / "transformer"}):
        pipe = load("self_forcing", tiny_folder, **parts, **{keyword: torch.bfloat16})
        assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert pipe.transformer.scale_shift_table.dtype == torch.float32, "diffusers keeps these in float32"
        assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_a_device_map_is_handed_on(tiny_preset, tiny_folder):
    assert load("self_forcing", tiny_folder, device_map="cpu").hf_device_map == "cpu"


class EightBitLinear(torch.nn.Module):
    """A linear layer with eight-bit weights, as quantisers put in the place of ``nn.Linear``."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class StubMethod(StrEnum):
    STUB = "stub"


class StubConfig(QuantizationConfigMixin):
    def __init__(self):
        self.quant_method = StubMethod.STUB

    def to_diff_dict(self):
        return self.to_dict()


class StubQuantizer(DiffusersQuantizer):
    """Quantises linear layers once the weights are there."""

    def _process_model_before_weight_loading(self, model, **kwargs):
        model.is_quantized = True

    def _process_model_after_weight_loading(self, model, **kwargs):
        for path, module in list(model.named_modules()):
            for name, child in module.named_children():
                # As diffusers' own quantisers do, leave what the model keeps in float32.
                if isinstance(child, torch.nn.Linear) and "time_embedder" not in path:
                    setattr(module, name, EightBitLinear(child))
        return model

    is_serializable = is_trainable = is_compileable = False


def test_quantised_weights_go_through_diffusers_and_roll_out(tiny_preset, tiny_folder, monkeypatch):
    monkeypatch.setitem(quantizers.AUTO_QUANTIZER_MAPPING, "stub", StubQuantizer)
    monkeypatch.setitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "stub", StubConfig)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": StubConfig()})
    pipe = load("self_forcing", tiny_folder, quantization_config=config)
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, EightBitLinear)
    assert not any(isinstance(module, EightBitLinear) for module in pipe.vae.modules())
    exact = run(load("self_forcing", tiny_folder))
    rounded = run(pipe)
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_sharded_folders_open_here_and_ours_open_in_diffusers(tiny_folder, tiny_family, tmp_path):
    theirs, ours, dtype = tmp_path / "theirs", tmp_path / "ours", torch.bfloat16
    stock = WanPipeline.from_pretrained(tiny_folder, dtype=dtype)
    stock.save_pretrained(theirs, max_shard_size="100KB")
    pipe = load(theirs, family=tiny_family, dtype=dtype)
    pipe.save_pretrained(ours, max_shard_size="100KB")
    assert all(len(list((path / "transformer").glob("*-of-*.safetensors"))) >= 2 for path in (theirs, ours))
    again = DiffusionPipeline.from_pretrained(ours, dtype=dtype)
    assert type(again) is WanPipeline and type(again.transformer) is WanTransformer3DModel
    for name, tensor in stock.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], tensor), name
    assert torch.equal(run(load(ours, family=tiny_family, dtype=dtype)), run(pipe))


@pytest.mark.parametrize(
    ("file", "entries", "messages"),
    [
        ("transformer/config.json", {"num_layers": 3}, ["size 1.3B", "num_layers=3 instead of 2", "without a preset"]),
        ("transformer/config.json", {"in_channels": 36}, ["image-to-video", "in_channels=36", "text-to-video"]),
        ("transformer/config.json", {"added_kv_proj_dim": 48}, ["image-to-video", "added_kv_proj_dim=48"]),
        ("transformer/config.json", {"in_channels": 48, "out_channels": 48}, ["Wan2.2", "in_channels=48"]),
        ("transformer/config.json", {"_class_name": "FluxTransformer2D"}, ["FluxTransformer2D", "Wan2.1"]),
        ("transformer/config.json", {"text_dim": 64}, ["d_model=32", "text_dim=64", "text_encoder"]),
        ("vae/config.json", {"z_dim": 16}, ["z_dim=16", "in_channels=4", "vae"]),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, ["is a AutoencoderKL", "AutoencoderKLWan"]),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 8}, ["ends at 8 tokens", "max_sequence_length=16"]),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, ["transformer_2", "Wan2.2"]),
    ],
)
def test_what_does_not_fit_is_refused_before_loading(tiny_preset, copy_of, monkeypatch, file, entries, messages):
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda *a, **k: pytest.fail("a weight was loaded"))
    with pytest.raises(ValueError) as error:
        load("self_forcing", copy_of(file, **entries))
    assert all(message in str(error.value) for message in messages), error.value


def test_another_size_is_told_which_presets_have_it(copy_of):
    folder = copy_of("transformer/config.json", **loading.TRANSFORMERS["14B"], in_channels=16, out_channels=16)
    with pytest.raises(ValueError, match=r"it is 14B: name a preset of that size \(krea_14b\)"):
        load("self_forcing", folder)


NAMES = ("transformer", "vae", "text_encoder", "tokenizer")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda tiny, tmp: load(tmp / "nowhere"), "does not exist"),
        (lambda tiny, tmp: load(tmp), "no model_index.json"),
        (lambda tiny, tmp: load(tmp / "pickled"), "a pickle"),
        (lambda tiny, tmp: load("self_forcing"), "no bundled weights"),
        (
            lambda tiny, tmp: load("self_forcing", tmp / "dmd.pt"),
            "convert .*dmd.pt --out DIR --preset self_f",
        ),
        (lambda tiny, tmp: load(tmp / "dmd.pt"), "--preset NAME"),
        (lambda tiny, tmp: load("self_forcin", tiny), "is no preset to run"),
        (lambda tiny, tmp: load("mini", family="self_forcing"), "name one of them"),
        (
            lambda tiny, tmp: load("self_forcing", transformer=tiny / "transformer", vae=tiny / "vae"),
            "give text_encoder, tokenizer too, or a folder",
        ),
        (lambda tiny, tmp: load("self_forcing", tiny, vae=tiny / "vea"), "is no folder"),
        (
            lambda tiny, tmp: load("causal_forcing", quantization_config=1, **{part: tiny / part for part in NAMES}),
            "of use for a folder",
        ),
    ],
)
def test_names_and_folders_in_the_wrong_places_are_named(tiny_preset, tiny_folder, tmp_path, read, message):
    (tmp_path / "pickled" / "transformer").mkdir(parents=True)
    (tmp_path / "pickled" / "model_index.json").write_text("{}")
    (tmp_path / "pickled" / "transformer" / "diffusion_pytorch_model.bin").touch()
    (tmp_path / "dmd.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=message):
        read(tiny_folder, tmp_path)


def test_parts_that_do_not_fit_each_other_are_refused(tiny_preset, tiny_folder, make_transformer):
    with pytest.raises(ValueError, match="d_model=32 and its transformer text_dim=16"):
        load(tiny_folder, transformer=make_transformer())
