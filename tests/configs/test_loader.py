"""Presets, files, options and dotted overrides make one validated run; every mistake is named in one line."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import yaml

from longtake.cache import POLICIES, make_policy
from longtake.configs.families import load_family
from longtake.configs.fields import build, preset_names
from longtake.configs.loader import _from_mapping, is_override, load_preset, load_run
from longtake.configs.run import MAX_PROMPT_WORDS
from longtake.samplers import SAMPLERS, make_sampler

PROMPT = "a red circle bouncing over a navy striped background"


def run(*overrides, path=None, **options):
    return load_run(path, options={"prompt": PROMPT} | options, overrides=overrides)


def test_every_policy_and_sampler_has_a_valid_preset_and_nothing_else_has():
    assert preset_names("cache") == sorted(POLICIES)
    assert preset_names("sampler") == sorted(SAMPLERS)
    for name in POLICIES:
        assert make_policy(load_preset("cache", name)).name == name
    for name in SAMPLERS:
        assert make_sampler(load_preset("sampler", name)).name == name
    for name in preset_names("model"):
        make_sampler(load_family(name).sampler)


def test_defaults_are_complete():
    config = run()
    assert (config.model.family, config.model.path) == ("mini", None)
    assert config.cache == load_preset("cache", "attention_sink")
    assert config.sampler == load_family("mini").sampler
    assert (config.prompt, config.seconds, config.seed) == (PROMPT, 60, 0)


def test_a_run_survives_its_own_yaml():
    config = run("cache.num_context_frames=9", "prompt_changes=[{at: 5, prompt: a blue ring}]", seconds=12.5, seed=3)
    text = yaml.safe_dump(config.as_mapping())
    assert _from_mapping(yaml.safe_load(text)) == config


def test_a_saved_run_loads_as_a_file(tmp_path):
    config = run("cache=full", "model.dtype=bfloat16")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.as_mapping()))
    assert load_run(path) == config


def test_swapping_the_cache_is_the_whole_change(tmp_path):
    path = tmp_path / "take.yaml"
    path.write_text(f"prompt: {PROMPT}\nseconds: 5\ncache: sliding_window\n")
    window = load_run(path)
    path.write_text(path.read_text().replace("sliding_window", "attention_sink"))
    sink = load_run(path)
    assert window.cache == load_preset("cache", "sliding_window")
    assert sink.cache == load_preset("cache", "attention_sink")


def test_layers_go_on_top_of_each_other(tmp_path):
    path = tmp_path / "take.yaml"
    path.write_text("seconds: 5\nseed: 1\ncache: {policy: attention_sink, num_context_frames: 15}\n")
    config = run("seed=7", "cache.num_sink_frames=4", path=path, seconds=6)
    assert (config.seconds, config.seed) == (6, 7)
    assert config.cache == {**load_preset("cache", "attention_sink"), "num_context_frames": 15, "num_sink_frames": 4}


def test_the_policy_in_a_wrapper_is_a_preset_too():
    config = run("cache={policy: quantized, bits: 4, inner: sliding_window}", "cache.inner.num_context_frames=9")
    assert config.cache["inner"] == load_preset("cache", "sliding_window") | {"num_context_frames": 9}
    assert (config.cache["policy"], config.cache["bits"]) == ("quantized", 4)
    assert make_policy(config.cache).inner.num_context_frames == 9
    twice = run("cache={policy: offloaded, inner: {policy: quantized, inner: full}}").cache["inner"]
    assert twice == load_preset("cache", "quantized") | {"inner": load_preset("cache", "full")}
    with pytest.raises(ValueError, match="Did you mean 'sliding_window'"):
        run("cache={policy: quantized, inner: sliding_windw}")


def test_a_value_may_be_of_one_type_or_another():
    assert make_policy({"policy": "budget", "max_bytes": 10**9}).num_bytes == 10**9
    assert make_policy({"policy": "budget", "max_bytes": "1.5 GiB"}).num_bytes == 3 * 2**29


@pytest.mark.parametrize("switch", ["cache=sliding_window", "cache.policy=sliding_window"])
def test_changing_the_policy_drops_the_old_ones_fields(switch):
    assert run("cache.num_sink_frames=5", switch).cache == load_preset("cache", "sliding_window")


def test_the_model_brings_its_sampler_and_the_run_may_name_another():
    assert run("model.family=mini").sampler == load_family("mini").sampler
    assert run("sampler=multi_step").sampler["name"] == "multi_step"
    assert run("sampler=few_step", "sampler.flow_shift=3").sampler["flow_shift"] == 3
    assert run("sampler.flow_shift=3").sampler == {**load_family("mini").sampler, "flow_shift": 3}


def test_a_model_may_be_a_folder(tmp_path):
    config = run(model=str(tmp_path))
    assert (config.model.family, config.model.path) == ("self_forcing", str(tmp_path))
    config = run("model.family=mini", model=str(tmp_path))
    assert (config.model.family, config.model.path) == ("mini", str(tmp_path))
    config = run("model=self_forcing", f"model.path={tmp_path}")
    assert (config.model.family, config.model.path) == ("self_forcing", str(tmp_path))
    path = tmp_path / "take.yaml"
    path.write_text(f"model: {{family: self_forcing, path: {tmp_path}, dtype: bfloat16}}\n")
    assert run(path=path).model.path == str(tmp_path)
    other = run("model=mini", path=path).model
    assert (other.path, other.dtype) == (None, "bfloat16"), "another family's folder must not stay"


def test_a_prompt_is_text_as_it_stands():
    assert run(prompt="a sign that says ${price} = 3").prompt == "a sign that says ${price} = 3"


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["cache=sink_windw"], {}, "unknown cache policy 'sink_windw'"),
        (["cache=atention_sink"], {}, "Did you mean 'attention_sink'"),
        (["sampler=fewstep"], {}, "Did you mean 'few_step'"),
        ([], {"model": "minni"}, "Did you mean 'mini'"),
        (["model=self_forcing"], {}, "model.path=FOLDER"),
        (["secnds=3"], {}, "Did you mean 'seconds'"),
        (["output.crff=3"], {}, "Did you mean 'crf'"),
        (["output.crf=99"], {}, "output.crf=99"),
        (["output.num_kept_states=1"], {}, "give 2 or more"),
        (["model.dtype=float64"], {}, "'float32', 'bfloat16'"),
        (["seconds=long"], {}, "must be a number"),
        (["seed=1.5"], {}, "whole number"),
        (["cache=3"], {}, "must be a mapping"),
        (["prompt_changes=[{at: 3}]"], {}, "lacks 'prompt'"),
        (["prompt_changes=[{at: 3, prompt: a}, {at: 2, prompt: b}]"], {}, "rising"),
        (["prompt_changes=[{at: -3, prompt: a}]"], {}, "above 0"),
        (["nonsense"], {}, "key=value"),
        (["seconds=[1"], {}, "no YAML"),
        ([], {"seconds": 0.0}, "seconds=0.0"),
        ([], {"seconds": -5.0}, "above 0"),
        ([], {"seconds": float("nan")}, "above 0"),
        ([], {"seconds": float("inf")}, "above 0"),
        ([], {"seed": -1}, "seed=-1"),
        (["height=100"], {}, "height=100 is not a positive multiple of 16: use 96"),
        (["width=0"], {}, "width=0"),
        ([], {"prompt": "  "}, "the prompt is empty"),
        ([], {"prompt": "word " * 10_000}, f"10000 words, the text encoder reads {MAX_PROMPT_WORDS}"),
    ],
)
def test_mistakes_are_named_in_one_line(overrides, options, message):
    with pytest.raises(ValueError) as error:
        run(*overrides, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["seconds: [", "- a list", "secnds: 3", "prompt: ${nothing}", "cache: {1: 2}"])
def test_a_broken_file_is_named_in_one_line(tmp_path, text):
    path = tmp_path / "take.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_run(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load_run(tmp_path / "none.yaml")


def test_words_of_the_command_line():
    assert is_override("cache.policy=full") and is_override("seed=3")
    assert not is_override(PROMPT) and not is_override("two words=3")


def test_nested_dataclasses_are_built_and_named():
    @dataclass(frozen=True, kw_only=True)
    class Inner:
        size: int
        kind: Literal["a", "b"] = "a"

    @dataclass(frozen=True, kw_only=True)
    class Outer:
        one: Inner | None = None
        many: tuple[Inner, ...] = ()
        free: Mapping[str, Any] | None = None

    built = build(Outer, {"one": {"size": 3}, "many": [{"size": 1, "kind": "b"}], "free": {"x": [1]}}, what="it")
    assert built == Outer(one=Inner(size=3), many=(Inner(size=1, kind="b"),), free={"x": [1]})
    for values, message in (
        ({"one": {"sise": 3}}, "unknown key 'sise' for the one of it; known: size, kind. Did you mean 'size'?"),
        ({"many": [{"kind": "b"}]}, "an entry of many of it lacks 'size'"),
        ({"one": {"size": True}}, "size of the one of it is True but must be a whole number."),
        ({"one": 3}, "the one of it is 3: it must be a mapping of keys to values"),
    ):
        with pytest.raises(ValueError) as error:
            build(Outer, values, what="it")
        assert str(error.value) == message
