"""Shards as diffusers writes them, memory that does not grow with the file, and what a description says."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from make_checkpoint import write_family
from safetensors import safe_open

from longtake.models.checkpoints import files, wan_parts
from longtake.models.checkpoints.converting import ConversionRequest, describe_checkpoint, plan_conversion
from longtake.models.checkpoints.files import TensorInfo, open_checkpoint
from longtake.models.checkpoints.parts import OutputTensor, Part, parse_bytes


def public(model):
    found = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return found | {"patch_size": list(found["patch_size"])}


@pytest.mark.parametrize("limit", ["10GB", "30KB", "1KB"])
def test_files_are_those_of_diffusers(limit, tmp_path, build_reference, read_by_hand):
    (path,) = write_family(tmp_path / "repository", "self_forcing_ode")
    plan_conversion(ConversionRequest(source=path, max_shard_bytes=parse_bytes(limit))).write(tmp_path / "ours")
    model = build_reference(read_by_hand(path, "generator"))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    ours, theirs = ({file.name for file in (tmp_path / name).iterdir()} for name in ("ours", "theirs"))
    assert ours - theirs == {"conversion.json"} and theirs <= ours
    for name in sorted(theirs):
        if name.endswith(".json"):
            found, wanted = (json.loads((tmp_path / side / name).read_text()) for side in ("ours", "theirs"))
            for both in (found, wanted):  # of the index, the size alone
                both["metadata"] = both.get("metadata", {}).get("total_size")
            assert {k: found[k] for k in wanted} == wanted
        else:
            with safe_open(tmp_path / "ours" / name, "pt") as a, safe_open(tmp_path / "theirs" / name, "pt") as b:
                assert a.metadata() == b.metadata() == {"format": "pt"}
                assert set(a.keys()) == set(b.keys())
                assert all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in b.keys())  # noqa: SIM118
    assert public(WanTransformer3DModel.from_pretrained(tmp_path / "ours")) == public(model)


def test_mixed_dtypes_and_odd_shapes_are_read_by_safetensors(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(7, dtype=torch.float64),
        "c": torch.tensor(2.5),
        "d": torch.zeros(0, 4),
        "e": torch.randn(4, 6).T,
        "f": torch.randn(5).half(),
    }
    outputs = [
        OutputTensor(name=n, info=TensorInfo(tuple(t.shape), t.dtype), load=lambda t=t: t) for n, t in tensors.items()
    ]
    Part(name="x", tensors=outputs).write(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as archive:
        assert all(torch.equal(archive.get_tensor(name), tensor) for name, tensor in tensors.items())
    found = open_checkpoint(file)
    assert all(torch.equal(found.read("", name), tensor) for name, tensor in tensors.items())
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 64 == 0


def test_sizes():
    for text, size in (("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("300", 300), ("2kb", 2000)):
        assert parse_bytes(text) == size
    for text in ("", "0", "GB", "-1GB", "5TBs", "1e9", "5 G B"):
        with pytest.raises(ValueError, match="write it like 5GB"):
            parse_bytes(text)


def test_a_mapping_is_closed_and_opened_again_as_it_is_read(tmp_path, monkeypatch):
    (path,) = write_family(tmp_path / "repository", "self_forcing_ode")
    plan_conversion(ConversionRequest(source=path)).write(tmp_path / "whole")
    opened = []
    load = files._load
    monkeypatch.setattr(files, "_load", lambda path: opened.append(path) or load(path))
    monkeypatch.setattr(files, "_RELEASE_BYTES", 8192)
    plan_conversion(ConversionRequest(source=path)).write(tmp_path / "often")
    assert len(opened) > 5
    names = [file.name for file in (tmp_path / "whole").iterdir()]
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "often" / n).read_bytes() for n in names)


def _resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_resident_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """30 tensors of 4 MB: never more than a few of them at a time, from either container."""
    monkeypatch.setattr(files, "_RELEASE_BYTES", 1 << 23)
    numbers = torch.ones(1 << 20)
    path = tmp_path / "big.pt"
    torch.save({"generator": {f"t{i}": numbers + i for i in range(30)}}, path)

    def rewrite(source, folder):
        folder.mkdir()
        checkpoint = open_checkpoint(source)
        ((entry, infos),) = checkpoint.entries.items()
        outputs = [
            OutputTensor(name=name, info=info, load=lambda name=name: checkpoint.read(entry, name))
            for name, info in infos.items()
        ]
        before, most = _resident_bytes(), []
        part = Part(name="big", tensors=outputs)
        part.write(folder, on_tensor=lambda tensor: most.append(_resident_bytes()))
        (file,) = folder.glob("*.safetensors")
        assert max(most) - before < 40e6, (max(most) - before) / 1e6
        return file

    file = rewrite(path, tmp_path / "a")
    again = rewrite(file, tmp_path / "b")
    assert file.read_bytes() == again.read_bytes() and file.stat().st_size > 120e6


def test_descriptions(tmp_path, monkeypatch):
    (path,) = write_family(tmp_path / "repository", "self_forcing_training")
    rows = dict(describe_checkpoint(path))
    assert rows["container"] == "pickle (zip), 3 entries"
    assert rows["generator_ema"] == (
        "69 tensors, 19,640 numbers, float32: a Wan transformer, original naming, prefixes model, _fsdp_wrapped_module"
    )
    assert rows["taken unasked"] == "generator_ema" and "may belong to" not in rows
    assert rows["model"].startswith("own size, text-to-video: 2 layers, 24 wide, 2 heads of 12, feed-forward 32")
    monkeypatch.setitem(wan_parts._SIZES, (24, 32, 2), "1.3B")  # as if it were of full size
    rows = dict(describe_checkpoint(path))
    assert rows["model"].startswith("1.3B, ") and "self_forcing" in rows["may belong to"].split(", ")
    (flat,) = write_family(tmp_path / "flat", "wan")
    rows = dict(describe_checkpoint(flat))
    assert rows["taken unasked"] == "(no entry: tensors at the top)" and "bfloat16" in rows[rows["taken unasked"]]
    assert "self_forcing" not in rows.get("may belong to", "").split(", ")
    lora = write_family(tmp_path / "longlive", "longlive")[1]
    rows = dict(describe_checkpoint(lora))
    assert rows["taken as"] == "a LoRA adapter (20 pairs)" and rows["beside them"] == "step"
    assert "40 tensors" in rows["generator_lora"] and "rank 4" in rows["generator_lora"]


def test_a_description_says_why_a_file_cannot_be_converted(tmp_path):
    path = tmp_path / "part.pt"
    torch.save({"generator": {"model.blocks.0.modulation": torch.zeros(1, 6, 24)}}, path)
    assert "incomplete" in dict(describe_checkpoint(path))["cannot be converted"]
    torch.save({"ema": {"x.y": torch.zeros(2)}}, path)
    assert "no part of Wan: 1 tensors such as x.y" in dict(describe_checkpoint(path))["taken as"]


def test_describing_reads_no_weights(tmp_path, monkeypatch):
    (path,) = write_family(tmp_path / "repository", "self_forcing")
    monkeypatch.setattr(files._PickleReader, "__call__", lambda *args: pytest.fail("a weight was read"))
    assert dict(describe_checkpoint(path))["taken unasked"] == "generator_ema"
