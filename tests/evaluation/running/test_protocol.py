"""Protocols: files, options over them, hashes that hold them to their content, and one per folder."""

from dataclasses import fields, replace

import pytest
import yaml

from longtake.cache import POLICIES
from longtake.evaluation.metrics import GROUPS
from longtake.evaluation.running.protocol import GROUPS as KNOWN_GROUPS
from longtake.evaluation.running.protocol import (
    Protocol,
    _difference,
    _parse_cache,
    check_prompts,
    load_protocol,
    protocol_names,
    resolve_backbones,
    resolve_generation,
    settle,
    split_caches,
)


@pytest.mark.parametrize("name", ["quick", "standard", "long", "policies", "history", "compressors", "attention"])
def test_the_bundled_protocols_and_studies_resolve(name):
    assert name in protocol_names()
    protocol = resolve_generation(load_protocol(name))
    assert protocol.name == name and protocol.baseline in protocol.caches and len(protocol.model_sha256) == 64
    assert resolve_generation(protocol) == protocol and max(protocol.moments) == protocol.seconds
    if name in ("quick", "standard", "long"):
        window = {"policy": "sliding_window", "num_context_frames": 21, "positions": "absolute"}
        assert protocol.caches["sliding_window"] == window


def test_the_study_of_policies_has_all_of_them():
    own = {name for name, policy in POLICIES.items() if "inner" not in {field.name for field in fields(policy)}}
    assert len(own) >= 17 and set(load_protocol("policies").caches) <= own


def test_the_bundled_study_of_attention_resolves():
    protocol = resolve_generation(load_protocol("attention"))
    assert protocol.baseline == "dense" and "attention" not in protocol.caches["dense"]
    sparse = {label: entry["attention"] for label, entry in protocol.caches.items() if label != "dense"}
    assert {(label.rpartition("-")[0], label[-2:]) for label in sparse} == {
        (policy, density) for policy in ("radial", "light_forcing") for density in ("75", "50", "30")
    }
    assert all(label.startswith(attention["policy"]) for label, attention in sparse.items())
    assert {entry["num_context_frames"] for entry in protocol.caches.values()} == {21}


def test_groups_are_those_of_the_metrics():
    assert KNOWN_GROUPS == GROUPS


def test_a_written_protocol_loads_as_itself(tmp_path):
    options = {"caches": ["pack", "deep={policy: attention_sink, num_sink_frames: 6}"], "baseline": "pack"}
    protocol = resolve_generation(load_protocol("quick", options=options))
    assert protocol.caches["deep"]["num_sink_frames"] == 6 and protocol.caches["deep"]["num_context_frames"] == 12
    settle(tmp_path, protocol)
    again = load_protocol(tmp_path / "protocol.yaml")
    assert again == protocol and again.fingerprint() == protocol.fingerprint()
    assert protocol.fingerprint() in (tmp_path / "protocol.yaml").read_text()
    settle(tmp_path, again)


def test_another_protocol_in_the_same_folder_is_refused_with_what_differs(tmp_path):
    protocol = resolve_generation(load_protocol("quick"))
    settle(tmp_path, protocol)
    settle(tmp_path, replace(protocol, name="other", prompts="elsewhere.txt"))
    with pytest.raises(
        ValueError, match=r"another protocol \(samples: 1 -> 2; seconds: 10 -> 20\).*use another --out"
    ):
        settle(tmp_path, replace(protocol, seconds=20, samples=2))


def test_the_fingerprint_is_of_content_not_of_places():
    protocol = Protocol(caches={"a": {"policy": "full"}}, model_sha256="1", prompts_sha256="2")
    same = replace(protocol, model="elsewhere", prompts="elsewhere.txt", name="other", seconds=60, num_prompts=3)
    assert same.fingerprint() == protocol.fingerprint() and _difference(protocol, same) == []
    for change in ({"model_sha256": "3"}, {"prompts_sha256": "3"}, {"batch": 5}, {"threads": 2}, {"moments": (5.0,)}):
        assert replace(protocol, **change).fingerprint() != protocol.fingerprint()
    measured = Protocol(videos="clips")
    assert replace(measured, videos="other", seconds=5, batch=9).fingerprint() == measured.fingerprint()
    assert replace(measured, backbones_sha256="1").fingerprint() != measured.fingerprint()


def test_a_videos_hash_is_of_what_it_depends_on():
    protocol = Protocol(caches={"a": {"policy": "full"}, "b": {"policy": "pack"}}, model_sha256="1")
    assert protocol.config_hash("a") != protocol.config_hash("b")
    assert replace(protocol, metrics=("judge",), samples=9).config_hash("a") == protocol.config_hash("a")
    assert replace(protocol, seconds=9.0).config_hash("a") != protocol.config_hash("a")


def test_attention_is_part_of_a_label_and_of_its_hash_only_where_it_is_sparse(tmp_path):
    def resolved(*caches):
        return resolve_generation(load_protocol("quick", options={"caches": list(caches)}))

    plain = resolved("a={policy: attention_sink}", "b=sliding_window")
    # As hashes were before labels could carry attention.
    caches = {"a": {"policy": "attention_sink", "num_context_frames": 12}}
    known = Protocol(caches=caches, model_sha256="1", prompts_sha256="2")
    assert (known.fingerprint(), known.config_hash("a")) == ("0474fbf26e9bbacf", "0e3350a322c27848")
    dense = resolved("a={policy: attention_sink, attention: dense}", "b={policy: sliding_window, attention: }")
    assert dense == plain
    sparse = resolved("a={policy: attention_sink, attention: {policy: radial, block_size: 4}}", "b=sliding_window")
    assert sparse.caches["a"]["attention"]["policy"] == "radial" and sparse.caches["a"]["attention"]["block_size"] == 4
    assert sparse.caches["a"]["attention"]["dense_steps"] == 1, "the preset's fields are there"
    assert sparse.caches["b"] == plain.caches["b"] and sparse.config_hash("b") == plain.config_hash("b")
    other = resolved("a={policy: attention_sink, attention: {policy: radial, block_size: 8}}", "b=sliding_window")
    hashes = {protocol.config_hash("a") for protocol in (plain, sparse, other)}
    assert len(hashes) == 3 == len({protocol.fingerprint() for protocol in (plain, sparse, other)})
    settle(tmp_path, sparse)
    assert load_protocol(tmp_path / "protocol.yaml") == sparse == resolve_generation(sparse)
    with pytest.raises(ValueError, match="another protocol"):
        settle(tmp_path, other)


def test_options_go_over_the_file_and_take_its_hashes_with_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"caches": ["full", "pack"], "baseline": "full", "prompts_sha256": "0" * 64}))
    assert load_protocol(path).prompts_sha256 == "0" * 64
    other = load_protocol(path, options={"prompts": "other.txt", "caches": ["pack"]})
    assert other.prompts_sha256 is None
    assert load_protocol(path, options={"samples": 3}).prompts_sha256 == "0" * 64
    named = tmp_path / "named.yaml"
    named.write_text(yaml.safe_dump({"prompts": "a.txt", "prompts_sha256": "0" * 64, "caches": ["full"]}))
    assert load_protocol(named, options={"prompts": "b.txt"}).prompts_sha256 is None
    assert other.baseline is None and list(other.caches) == ["pack"]
    with pytest.raises(ValueError, match="baseline 'full' is none of the runs: pack"):
        load_protocol(path, options={"caches": ["pack"], "baseline": "full"})


def test_hashes_hold_the_content(tmp_path):
    protocol = load_protocol("quick")
    with pytest.raises(ValueError, match="prompts suite:moving_scenes: sha256 is bb.*made for aa"):
        check_prompts(replace(protocol, prompts_sha256="a" * 64), "b" * 64)
    with pytest.raises(ValueError, match="model mini: sha256 is .*take model_sha256 out"):
        resolve_generation(replace(protocol, model_sha256="a" * 64))
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    known = resolve_backbones(replace(protocol, backbones=str(path)))
    path.write_text("x = 2\n")
    with pytest.raises(ValueError, match="backbones .*mine.py: sha256 is"):
        resolve_backbones(known)
    with pytest.raises(ValueError, match="cannot read the backbones none.py"):
        resolve_backbones(replace(protocol, backbones="none.py"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "seconds=0: give a length above 0"),
        ({"samples": 0}, "samples=0: give 1 or more"),
        ({"sample": 2}, "unknown key 'sample'.*Did you mean 'samples'"),
        ({"metrics": ["weightfree"]}, "unknown group of metrics 'weightfree'.*Did you mean 'weight_free'"),
        ({"metrics": []}, "metrics is empty"),
        ({"moments": [-1]}, "moments=.*above 0"),
        ({"caches": []}, "caches is empty"),
        ({"caches": ["a/b={policy: full}"]}, "label 'a/b' names a folder"),
        ({"caches": ["x={num_sink_frames: 3}"]}, "write NAME or 'LABEL="),
        ({"caches": ["x={policy"]}, "is no YAML"),
        ({"dtype": "float64"}, "known: 'float32', 'bfloat16'"),
        ({"crf": 99}, "crf=99"),
        ({"seconds": "long"}, "must be a number"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        load_protocol("quick", options=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caches": ["sliding_windw"]}, "unknown cache policy 'sliding_windw'.*Did you mean 'sliding_window'"),
        ({"caches": ["x={policy: attention_sink, num_context_frames: 4}"]}, "cache 'x': num_context_frames=4"),
        ({"model": "self_forcing"}, "no bundled weights"),
        ({"model": "nowhere"}, "nowhere"),
        ({"family": "self_forcing"}, "the bundled model 'mini' has its own"),
        ({"caches": ["x={policy: full, attention: radal}"]}, "attention policy 'radal'.*Did you mean 'radial'"),
        ({"caches": ["x={policy: full, attention: {policy: radial, blok_size: 4}}"]}, "cache 'x': .*block_size"),
        ({"caches": ["x={policy: tempcache, attention: radial}"]}, "cache 'x': .*weights its tokens"),
        ({"caches": ["x={policy: forcing_kv, attention: svg}"]}, "cache 'x': .*gives heads different tokens"),
        ({"caches": ["x={policy: full, attention: {policy: radial, backend: gather}}"]}, "cache 'x': .*gather_sdpa"),
        ({"caches": ["x={policy: full, attention: {policy: radial, backend: flash3}}"]}, "cache 'x': .*cannot run"),
    ],
)
def test_what_is_not_there_is_refused_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_generation(load_protocol("quick", options=options))


def test_files_that_are_no_protocol(tmp_path):
    for text, message in (("[1]", "must be a mapping"), ("a: [", "is no YAML")):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_protocol(path)
    with pytest.raises(ValueError, match="cannot read the protocol quik: .*Did you mean 'quick'"):
        load_protocol("quik")


def test_policies_on_the_command_line():
    texts = ["full,pack", "deep={policy: deep_forcing, heads: [1, 2]},sliding_window", " "]
    parts = split_caches(texts)
    assert parts == ["full", "pack", "deep={policy: deep_forcing, heads: [1, 2]}", "sliding_window"]
    assert _parse_cache(parts[2]) == ("deep", {"policy": "deep_forcing", "heads": [1, 2]})
    assert _parse_cache({"x": {"policy": "full"}}) == ("x", {"policy": "full"})
    assert _parse_cache("other=full") == ("other", "full")
