"""A run's record tells weights apart."""

import pytest
import torch

from longtake.pipelines import run_folder


def write_weights(folder, name="transformer/weights.safetensors", data=b"0123456789" * 100):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("limit", [1 << 28, 10])
def test_the_weights_hash_sees_every_kind_of_change(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(run_folder, "_FULL_HASH_BYTES", limit)
    monkeypatch.setattr(run_folder, "_SAMPLE_BYTES", 8)
    path = write_weights(tmp_path)
    (tmp_path / "notes.txt").write_text("not a weight")
    before = run_folder.weights_hash(tmp_path)
    assert before["method"] == ("full" if limit > 1000 else "sampled")
    assert (before["num_files"], before["num_bytes"]) == (1, 1000)
    (tmp_path / "notes.txt").write_text("changed")
    assert run_folder.weights_hash(tmp_path) == before
    for data in (b"1" + path.read_bytes()[1:], path.read_bytes()[:-1] + b"x", path.read_bytes() + b"0"):
        write_weights(tmp_path, data=data)
        assert run_folder.weights_hash(tmp_path)["sha256"] != before["sha256"]
    path.unlink()
    write_weights(tmp_path, "transformer/renamed.safetensors")
    assert run_folder.weights_hash(tmp_path)["sha256"] != before["sha256"]


def test_versions_and_machine_are_named():
    assert {"python", "longtake", "torch", "diffusers"} <= set(run_folder.versions())
    machine = run_folder.machine(torch.device("cpu"))
    assert machine["device"] == "cpu" and machine["num_threads"] == torch.get_num_threads()
