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

from longtake.configs.families import load_family
from longtake.pipelines import LongVideoPipeline, loading

PROMPT = "a red circle moving left over a navy plain background"
SINK = {"policy": "attention_sink", "num_context_frames": 9, "num_sink_frames": 3}
TINY = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 96}


def run(pipe, **settings):
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_frames": 21, "height": 32, "width": 32, "cache": SINK, "seed": 3, "output_type": "pt"} | settings
    return pipe(PROMPT, **settings).frames


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
    by_both = LongVideoPipeline.from_pretrained("self_forcing", tiny_folder)
    assert by_both.family == tiny_preset
    by_family = LongVideoPipeline.from_pretrained(tiny_folder, family="self_forcing")
    alone = LongVideoPipeline.from_pretrained(tiny_folder)
    video = run(by_both)
    for other in (by_family, alone):
        assert other.family == tiny_preset and torch.equal(run(other), video)
    assert not torch.equal(run(tiny_pipe), video), "the tiny family has two steps, the preset four"


def test_parts_one_by_one_as_objects_or_folders(tiny_preset, tiny_folder):
    whole = LongVideoPipeline.from_pretrained("self_forcing", tiny_folder)
    video = run(whole)
    parts = {part: tiny_folder / part for part in ("transformer", "vae", "text_encoder", "tokenizer")}
    assert torch.equal(run(LongVideoPipeline.from_pretrained("self_forcing", **parts)), video)
    objects = {part: whole.components[part] for part in parts}
    assert torch.equal(run(LongVideoPipeline.from_pretrained("self_forcing", **objects)), video)

    # A part of one's own in a folder that has the others, which need not have that one.
    torch.manual_seed(1)
    vae = AutoencoderKLWan.from_config(whole.vae.config).eval()
    mixed = LongVideoPipeline.from_pretrained("self_forcing", tiny_folder, vae=vae, transformer=parts["transformer"])
    assert mixed.vae is vae
    assert not torch.equal(run(mixed), video)
    assert torch.equal(run(mixed, output_type="latent"), run(whole, output_type="latent"))


def test_a_part_may_be_missing_from_the_folder_if_it_is_given(tiny_preset, copy_of, tiny_folder):
    folder = copy_of()
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="holds no .safetensors"):
        LongVideoPipeline.from_pretrained("self_forcing", folder)
    pipe = LongVideoPipeline.from_pretrained("self_forcing", folder, vae=tiny_folder / "vae")
    assert torch.equal(run(pipe), run(LongVideoPipeline.from_pretrained("self_forcing", tiny_folder)))


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_a_type_for_folders_and_parts(tiny_preset, tiny_folder, keyword):
    chosen = {keyword: torch.bfloat16}
    for pipe in (
        LongVideoPipeline.from_pretrained("self_forcing", tiny_folder, **chosen),
        LongVideoPipeline.from_pretrained(
            "self_forcing", tiny_folder, transformer=tiny_folder / "transformer", **chosen
        ),
    ):
        assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert pipe.transformer.scale_shift_table.dtype == torch.float32, "diffusers keeps these in float32"
        assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_a_device_map_is_handed_on(tiny_preset, tiny_folder):
    pipe = LongVideoPipeline.from_pretrained("self_forcing", tiny_folder, device_map="cpu")
    assert pipe.hf_device_map == "cpu"
    assert torch.equal(run(pipe), run(LongVideoPipeline.from_pretrained("self_forcing", tiny_folder)))


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
    pipe = LongVideoPipeline.from_pretrained("self_forcing", tiny_folder, quantization_config=config)
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, EightBitLinear)
    assert not any(isinstance(module, EightBitLinear) for module in pipe.vae.modules())
    exact = run(LongVideoPipeline.from_pretrained("self_forcing", tiny_folder))
    rounded = run(pipe)
    assert 0 < (rounded - exact).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_folders_open_here_and_ours_open_in_diffusers(tiny_folder, tiny_family, tmp_path, dtype):
    stock = WanPipeline.from_pretrained(tiny_folder, dtype=dtype)
    stock.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    shards = list((tmp_path / "theirs" / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) >= 2
    pipe = LongVideoPipeline.from_pretrained(tmp_path / "theirs", family=tiny_family, dtype=dtype)
    video = run(pipe)

    pipe.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    assert len(list((tmp_path / "ours" / "transformer").glob("*-of-*.safetensors"))) >= 2
    again = DiffusionPipeline.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert type(again) is WanPipeline and type(again.transformer) is WanTransformer3DModel
    for name, tensor in stock.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], tensor), name
    reopened = LongVideoPipeline.from_pretrained(tmp_path / "ours", family=tiny_family, dtype=dtype)
    assert torch.equal(run(reopened), video)


@pytest.mark.parametrize(
    ("file", "entries", "messages"),
    [
        ("transformer/config.json", {"num_layers": 3}, ["size 1.3B", "num_layers=3 instead of 2", "without a preset"]),
        ("transformer/config.json", {"in_channels": 36}, ["image-to-video", "in_channels=36", "text-to-video"]),
        ("transformer/config.json", {"added_kv_proj_dim": 48}, ["image-to-video", "added_kv_proj_dim=48"]),
        ("transformer/config.json", {"in_channels": 48, "out_channels": 48}, ["Wan2.2", "in_channels=48"]),
        (
            "transformer/config.json",
            {"_class_name": "FluxTransformer2DModel"},
            ["FluxTransformer2DModel", "Wan2.1"],
        ),
        ("transformer/config.json", {"text_dim": 64}, ["d_model=32", "text_dim=64", "text_encoder"]),
        ("vae/config.json", {"z_dim": 16}, ["z_dim=16", "in_channels=4", "vae"]),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, ["is a AutoencoderKL", "AutoencoderKLWan"]),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 8}, ["ends at 8 tokens", "max_sequence_length=16"]),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, ["transformer_2", "Wan2.2"]),
    ],
)
def test_what_does_not_fit_is_refused_before_loading(tiny_preset, copy_of, monkeypatch, file, entries, messages):
    def load(*args, **kwargs):
        raise RuntimeError("a weight was loaded")

    monkeypatch.setattr(WanPipeline, "from_pretrained", load)
    with pytest.raises(ValueError) as error:
        LongVideoPipeline.from_pretrained("self_forcing", copy_of(file, **entries))
    assert all(message in str(error.value) for message in messages), error.value


def test_another_size_is_told_which_presets_have_it(copy_of):
    folder = copy_of("transformer/config.json", **loading.TRANSFORMERS["14B"], in_channels=16, out_channels=16)
    with pytest.raises(ValueError, match=r"it is 14B: name a preset of that size \(krea_14b\)"):
        LongVideoPipeline.from_pretrained("self_forcing", folder)


def test_parts_that_do_not_fit_each_other_are_refused(tiny_preset, tiny_folder, make_transformer):
    with pytest.raises(ValueError, match="d_model=32 and its transformer text_dim=16"):
        LongVideoPipeline.from_pretrained(tiny_folder, transformer=make_transformer())
    with pytest.raises(ValueError, match="give text_encoder, tokenizer too, or a folder"):
        LongVideoPipeline.from_pretrained(
            "self_forcing", transformer=tiny_folder / "transformer", vae=tiny_folder / "vae"
        )
    with pytest.raises(ValueError, match="is no folder"):
        LongVideoPipeline.from_pretrained("self_forcing", tiny_folder, vae=tiny_folder / "vea")


def test_checkpoint_files_are_sent_to_convert(tmp_path):
    path = tmp_path / "self_forcing_dmd.pt"
    path.write_bytes(b"PK")
    command = f"longtake convert {path} --out DIR --preset self_forcing"
    with pytest.raises(ValueError, match=command):
        LongVideoPipeline.from_pretrained("self_forcing", path)
    with pytest.raises(ValueError, match="--preset NAME"):
        LongVideoPipeline.from_pretrained(path)


def test_names_and_folders_in_the_wrong_places(tiny_preset, tiny_folder):
    with pytest.raises(ValueError, match="is no preset to run"):
        LongVideoPipeline.from_pretrained("self_forcin", tiny_folder)
    with pytest.raises(ValueError, match="name one of them"):
        LongVideoPipeline.from_pretrained("mini", family="self_forcing")
    objects = LongVideoPipeline.from_pretrained(tiny_folder).components
    parts = {part: objects[part] for part in ("transformer", "vae", "text_encoder", "tokenizer")}
    with pytest.raises(ValueError, match="of use for a folder"):
        LongVideoPipeline.from_pretrained("causal_forcing", quantization_config=1, **parts)
