"""Damaged, dangerous or other files are refused in one line that says so; nothing is left behind."""

import json
import pickle
import zipfile

import pytest
import torch
from make_checkpoint import write_family
from safetensors.torch import save_file

from longtake.configs.families import ModelFamily, _CheckpointRule
from longtake.models.checkpoints import converting
from longtake.models.checkpoints.converting import ConversionRequest, plan_conversion
from longtake.models.checkpoints.files import TensorInfo, choose_entry, open_checkpoint


def convert(path, tmp_path, **settings):
    conversion = plan_conversion(ConversionRequest(source=path, **settings))
    conversion.write(tmp_path / "out")
    return conversion


def found(path, **settings):
    """The transformer of a file or folder."""
    return plan_conversion(ConversionRequest(source=path, **settings)).transformer


def assert_refused(path, tmp_path, message, **settings):
    """Its parts, between dots, must all be in the one line of the error."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        convert(path, tmp_path, **settings)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    assert all(part in text for part in message.split(" ... ")), text
    assert sorted(tmp_path.rglob("*")) == before


SUFFIXES = [".safetensors", ".pt"]


def save(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}, "step": 7}, path)


@pytest.fixture(params=SUFFIXES)
def make(request, wan, read_by_hand):
    """Writes changed weights in the place of Wan's; returns the path."""

    def change(edit):
        weights = read_by_hand(wan)
        wan.unlink()
        edit(weights)
        path = wan.with_suffix(request.param)
        save(path, weights)
        return path

    return change


@pytest.fixture
def wan(tmp_path):
    (path,) = write_family(tmp_path / "repository", "wan")
    return path


def _fill(name, number):
    def edit(weights):
        weights[name].view(-1)[3] = number

    return edit


def _replace(name, edit):
    return lambda weights: weights.update({name: edit(weights[name]).contiguous().clone()})


CORRUPTIONS = {
    "missing": (
        lambda w: w.pop("blocks.1.ffn.0.bias"),
        "missing in diffusers naming: 1 (blocks.1.ffn.net",
    ),
    "extra": (lambda w: w.update({"cls_pred.weight": torch.zeros(2)}), "unknown names: 1 ( ... weight) of 70"),
    "transposed": (
        _replace("blocks.0.ffn.0.weight", lambda t: t.T),
        "1 misshapen: blocks.0.ffn.net.0.proj.weight is [24, 32], should be [32, 24] (transposed) ... Nothing",
    ),
    "misshapen": (_replace("blocks.1.modulation", lambda t: t[:, :5]), "is [1, 5, 24], should be [1, 6, 24]"),
    "flat": (_replace("patch_embedding.weight", lambda t: t[:, :, 0, 0, 0]), "of shape [24, 4] ... 5 axes"),
    "scalar": (_replace("blocks.0.ffn.0.bias", lambda t: t[0]), "of shape [] ... 1 axes"),
    "NaN": (
        _fill("blocks.1.self_attn.v.weight", float("nan")),
        "NaN or infinity ... 1 (blocks.1.attn1.to_v.weight) of 69 ... Nothing was kept",
    ),
    "infinity": (_fill("head.head.weight", float("-inf")), "NaN or infinity ... 1 (proj_out.weight) of 69"),
    "many NaN": (lambda w: [t.fill_(float("nan")) for t in w.values()], "NaN or infinity ... more) of 69"),
    "quantised": (
        lambda w: w.update({n: t.to(torch.int8) for n, t in w.items() if "attn" in n}),
        "of 69 tensors as int8 ... quantised weights are not converted",
    ),
    "5B": (
        _replace("patch_embedding.weight", lambda t: t.repeat(1, 12, 1, 1, 1)),
        "Wan2.2-TI2V-5B transformer (48 latent channels ... give a model trained from Wan2.1",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_weights(name, make, tmp_path):
    edit, message = CORRUPTIONS[name]
    path = make(edit)
    assert_refused(path, tmp_path, f"{path} ... {message}")


def test_a_cast_that_overflows(make, tmp_path):
    path = make(_fill("blocks.0.ffn.2.weight", 1e38))
    assert_refused(path, tmp_path, "as read or after the cast ... --dtype too narrow", dtype="float16")
    convert(path, tmp_path, dtype="bfloat16")


@pytest.mark.parametrize("share", [0.999, 0.05])
def test_truncated_files(make, share, tmp_path):
    path = make(lambda weights: None)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert_refused(path, tmp_path, f"{path} ... truncated")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_wants_more_than_tensors_is_refused_unrun(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"generator": {"a": torch.zeros(2)}, "args": Bomb(tmp_path / "fired")}, path)
    assert_refused(path, tmp_path, "is refused ... io.open ... can run code")
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    assert_refused(path, tmp_path, "torch.nn.modules.linear.Linear")
    assert not (tmp_path / "fired").exists()


def _zip(path, members, *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _safetensors(path, **tensor):
    text = json.dumps({"a": tensor}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))


FILES = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "text": (lambda p: p.write_text("Weights: see the model page.\n" * 40), "is a text file"),
    "umlauts": (lambda p: p.write_text("Gewichte für später\n" * 40), "is a text file"),
    "pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "page": (lambda p: p.write_text("<!DOCTYPE html><html>"), "is a web page"),
    "gguf": (lambda p: p.write_bytes(b"GGUF\x03\0\0\0" + bytes(64)), "is a GGUF file"),
    "noise": (lambda p: p.write_bytes(bytes(range(255, 0, -1)) * 9), "neither a safetensors file nor"),
    "legacy": (lambda p: torch.save({}, p, _use_new_zipfile_serialization=False), "is a legacy pickle"),
    "plain pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "is a legacy pickle"),
    "other zip": (lambda p: _zip(p, {"readme.txt": "hello"}), "without data.pkl"),
    "packed zip": (lambda p: _zip(p, {"a/data.pkl": "x" * 99}, compression=zipfile.ZIP_DEFLATED), "packed zip"),
    "broken pickle": (lambda p: _zip(p, {"a/data.pkl": b"\x80\x02}q", "a/version": "3\n"}), "cannot be unpickled"),
    "script": (lambda p: _zip(p, {"a/data.pkl": "x", "a/constants.pkl": "x", "a/code/m.py": "x"}), "TorchScript"),
    "list": (lambda p: torch.save([torch.zeros(2)], p), "holds a list"),
    "no tensors": (lambda p: torch.save({"step": 3}, p), "holds no named tensors"),
    "expanded": (lambda p: torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, p), "fewer numbers"),
    "sparse": (lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p), "without plain numbers"),
    "header": (lambda p: p.write_bytes((20).to_bytes(8, "little") + b"{" + b"x" * 40), "truncated or damaged"),
    "long header": (lambda p: p.write_bytes((10**6).to_bytes(8, "little") + b"{" + b"x" * 40), "truncated"),
    "dtype": (lambda p: _safetensors(p, dtype="F4", shape=[8], data_offsets=[0, 4]), "unknown dtype F4"),
    "offsets": (
        lambda p: _safetensors(p, dtype="F32", shape=[9], data_offsets=[0, 4]),
        "invalid shape, data type",
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_files_are_named_whatever_their_suffix(name, suffix, tmp_path):
    write, message = FILES[name]
    path = tmp_path / f"file{suffix}"
    write(path)
    assert_refused(path, tmp_path, f"{path} ... {message}")


def test_containers_are_told_by_content(wan, tmp_path):
    moved = wan.with_suffix(".pt")
    wan.rename(moved)
    assert convert(moved, tmp_path).transformer.checkpoint.container == "safetensors"
    assert_refused(wan, tmp_path, "does not exist")


OTHERS = {
    "blocks.0.ffn.0.lora_A.weight blocks.0.ffn.0.lora_B.weight": "is a LoRA adapter (1 pairs) ... --lora",
    "blocks.0.ffn.0.base_layer.weight blocks.0.ffn.0.lora_A.default.weight": "not merged ... merge_and_unload",
    "encoder.conv1.weight conv2.weight decoder.middle.0.residual.2.bias": "a Wan VAE ... --vae",
    "encoder.conv_in.weight decoder.mid_block.resnets.0.norm1.gamma": "a Wan VAE ... --vae",
    "token_embedding.weight blocks.0.norm1.weight blocks.0.norm2.weight": "a UMT5 text encoder ... --text-encoder",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "--text-encoder",
    "vace_blocks.0.before_proj.weight patch_embedding.weight": "Wan-VACE ... does not run",
    "diffusion.down.0.weight unet.x": "no part of Wan: 2 tensors such as diffusion.down",
}


@pytest.mark.parametrize("names", OTHERS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_weights_are_named(names, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save(path, {name: torch.zeros(2, 2) for name in names.split()})
    assert_refused(path, tmp_path, OTHERS[names])


def test_entries(tmp_path, header_only):
    (path,) = write_family(tmp_path / "repository", "self_forcing_training")
    assert_refused(path, tmp_path, "no entry 'ema' ... generator: 69, critic: 69, generator_ema: 69", key="ema")
    assert convert(path, tmp_path, key="critic").record()["entry"] == "critic"
    infos = {"a": TensorInfo((1,), torch.float32)}
    for names, chosen in (
        (["model", "generator", "generator_ema"], "generator_ema"),
        (["critic", "model", "generator"], "generator"),
        (["state_dict", "model"], "model"),
        (["state_dict.generator", "critic"], "state_dict.generator"),
        (["", "critic"], ""),
    ):
        assert choose_entry(header_only(dict.fromkeys(names, infos))) == chosen
    with pytest.raises(ValueError, match="critic: 1, ema: 1, none of which is taken unasked.*--key"):
        choose_entry(header_only(dict.fromkeys(["critic", "ema"], infos)))


def test_nested_twice_and_with_other_values(tmp_path):
    path, tensor = tmp_path / "model.pt", torch.randn(1, 2, 24)
    optimiser = {"state": {0: {"exp_avg": torch.zeros(1)}}}
    torch.save({"state_dict": {"generator": {"a": tensor}}, "step": 7, "optimizer": optimiser}, path)
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.entries) == ["state_dict.generator"] and checkpoint.others == ["step", "optimizer"]
    assert torch.equal(checkpoint.read("state_dict.generator", "a"), tensor)


def test_presets(tmp_path, monkeypatch):
    (path,) = write_family(tmp_path / "repository", "self_forcing_training")
    (flat,) = write_family(tmp_path / "flat", "wan")
    message = "does not fit the preset 'self_forcing' ... 24 wide with 2 layers ... for 1.3B"
    assert_refused(path, tmp_path, message, preset="self_forcing")
    assert_refused(path, tmp_path, "unknown model family 'self_forcin'", preset="self_forcin")
    family = ModelFamily(checkpoint=_CheckpointRule(key="critic"))
    monkeypatch.setattr(converting, "load_family", lambda name: family)
    assert found(path, preset="x").entry == "critic"
    assert found(path, preset="x", key="generator").entry == "generator"
    assert found(flat, preset="x").entry == ""
    family = ModelFamily(checkpoint=_CheckpointRule(key="ema"))
    assert_refused(path, tmp_path, "no entry 'ema'", preset="x")


def test_shards(wan, tmp_path, read_by_hand):
    weights = read_by_hand(wan)
    names = sorted(weights)
    folder = wan.parent
    wan.unlink()
    parts = {f"m-0000{i}-of-00003.safetensors": {n: weights[n] for n in names[i - 1 :: 3]} for i in (1, 2, 3)}
    for name, part in parts.items():
        save_file(part, folder / name)
    first = folder / "m-00001-of-00003.safetensors"
    assert_refused(first, tmp_path, "one of 3 shards ... give the folder")
    assert found(folder).checkpoint.container == "safetensors, 3 shards"
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: name for name, part in parts.items() for n in part}}))
    for source in (folder, index):
        assert len(found(source).sources) == 69
    moved = first.with_name("elsewhere")
    first.rename(moved)
    assert_refused(folder, tmp_path, f"lists 3 shards, 1 of which are not beside it ... {first.name}")
    index.unlink()
    assert_refused(folder, tmp_path, f"one of 3 shards ... {first.name}")
    moved.rename(first)
    save_file({"head.modulation": weights["head.modulation"]}, folder / "n.safetensors")
    assert_refused(folder, tmp_path, "both hold head.modulation")


def test_folders(tmp_path, wan):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(empty, tmp_path, "holds no checkpoint")
    for name in ("a.pt", "b.pt"):
        torch.save({"a": torch.zeros(1)}, empty / name)
    assert_refused(empty, tmp_path, "holds 2 checkpoints (a.pt, b.pt)")


def test_config_json(wan, tmp_path):
    beside = wan.parent / "config.json"
    content = json.loads(beside.read_text())
    assert found(wan).config["num_attention_heads"] == 2
    given = tmp_path / "given.json"
    given.write_text(json.dumps(content | {"num_heads": 4}))
    assert found(wan, config=given).config["attention_head_dim"] == 6
    given.write_text(json.dumps({"num_attention_heads": 4, "attention_head_dim": 6, "eps": 1e-5}))
    config = found(wan, config=given).config
    assert (config["num_attention_heads"], config["eps"]) == (4, 1e-5)
    for text, message in (
        (json.dumps(content | {"num_layers": 30, "ffn_dim": 9}), "ffn_dim=9 but 32, num_layers=30 but 2"),
        (json.dumps(content | {"num_heads": 5}), "dim=24, no multiple of num_heads=5"),
        (json.dumps(content | {"num_heads": None}), "no multiple of num_heads=None"),
        ("{}", "describes no Wan transformer"),
        ("[1]", "holds no JSON object"),
    ):
        given.write_text(text)
        assert_refused(wan, tmp_path, message, config=given)
    assert_refused(wan, tmp_path, "cannot read", config=tmp_path / "none.json")
    beside.write_text('{"_class_name": "SomethingElse", "num_layers": 9}')
    assert_refused(wan, tmp_path, "24 wide, no multiple of the 128 ... --config")


def test_output_is_never_overwritten_and_interruptions_leave_nothing(wan, tmp_path, monkeypatch):
    plan = plan_conversion(ConversionRequest(source=wan))
    out = tmp_path / "deep" / "out"

    def interrupt(tensor):
        if tensor.name == "blocks.1.attn2.to_k.bias":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.write(out, on_tensor=interrupt)
    assert list(out.parent.iterdir()) == []
    plan.write(out)
    with pytest.raises(ValueError, match="exists already; nothing is overwritten"):
        plan.write(out)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: converting.shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(ValueError, match="0.0 GB free"):
        plan.write(tmp_path / "other")
