"""Protocol of an evaluation, one validated file: prompts, seeds, lengths, model, policies and metrics.

A resolved protocol holds hashes of prompts, weights and backbones instead of paths. Its fingerprint tells whether two
results may be put beside each other.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from longtake.configs.families import family_names, load_family
from longtake.configs.fields import build, choose, did_you_mean
from longtake.configs.loader import FOLDER_FAMILY, load_run
from longtake.evaluation.records import write_atomically

PROTOCOL_FILE = "protocol.yaml"
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
ATTENTION = "attention"  # key of an entry of ``caches`` beside the cache policy's own
GROUPS = ("vbench", "long", "weight_free", "judge")  # groups of metrics, as ``evaluation/metrics`` makes them
_PLACES = {
    *("name", "videos", "manifest", "prompt_file", "mixed_rates"),
    *("model", "prompts", "prompts_extended", "num_prompts", "backbones"),
}
"""Keys that say where something is, or repeat what a hash says: not part of the fingerprint."""
_GENERATION = {
    *("family", "model_sha256", "dtype", "device", "sampler"),
    *("seconds", "segment_event", "batch", "threads", "crf"),
}
"""Keys that a video depends on beside prompt, seed and policy."""
_HASHES = {
    "model": "model_sha256",
    "backbones": "backbones_sha256",
    **dict.fromkeys(("prompts", "prompts_extended", "num_prompts", "dimensions"), "prompts_sha256"),
    **dict.fromkeys(("segment_seconds", "seconds"), "prompts_sha256"),
}
"""{key: hash that belongs to what it names}; another list, model or file of backbones has another."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that decides the numbers of an evaluation."""

    name: str = "custom"  # of the protocol, for people
    videos: str | None = None  # folder of existing videos to measure; None to generate them
    manifest: str | None = None  # JSON lines that say what the existing videos were made from
    prompt_file: str | None = None  # JSON mapping of the existing videos' file names to prompts
    fps: float | None = None  # frames per second of folders of frames, which do not say it
    # Whether a run may hold existing videos of different frame rates. None: with given networks, because VBench
    # measures every clip at its own rate.
    mixed_rates: bool | None = None
    model: str = "mini"  # a family with bundled weights, or a diffusers folder
    family: str | None = None  # how a folder is run; a bundled model has its own
    model_sha256: str | None = None  # of the weights; filled in when it is resolved
    # What the model is loaded in; diffusers keeps what it has to in float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"  # ``cpu`` or ``cuda``; with several GPUs every worker takes the next
    sampler: Mapping[str, Any] | None = None  # mapping for ``make_sampler`` instead of the family's
    # {label: cache policy, as ``longtake generate`` takes it}; the label names the run's folder. A mapping may have
    # ``attention`` too: a sparse attention policy's name or mapping.
    caches: Mapping[str, Any] | None = None
    # ``suite:NAME`` or a file; see :func:`longtake.evaluation.running.suites.load_prompts`.
    prompts: str = "suite:moving_scenes"
    prompts_extended: str | None = None  # file with the longer twin of every prompt
    prompts_sha256: str | None = None  # of the list that is used; a list that does not fit is refused
    num_prompts: int | None = None  # only the first so many
    dimensions: tuple[str, ...] = ()  # only the prompts of these VBench dimensions
    samples: int = 1  # videos per prompt, each with a noise seed of its own
    seconds: float = 60.0  # length of every video
    segment_seconds: float | None = None  # prompts of the list follow each other within a video, each for so long
    # What happens to the cache when the prompt changes: keep, recache, flush or cut.
    segment_event: Literal["keep", "recache", "flush", "cut"] = "keep"
    batch: int = 4  # videos made together. Fixed, so that no number depends on how many processes work.
    threads: int = 1  # of each process, for the same reason
    crf: int = 12  # H.264 quality of the files that are measured: 0 (lossless) to 51
    metrics: tuple[str, ...] = GROUPS  # groups of metrics: vbench, long, weight_free, judge
    backbones: str | None = None  # Python or YAML file that names the networks; None for the classical stand-ins
    backbones_sha256: str | None = None  # of that file; filled in when it is resolved
    baseline: str | None = None  # label that the others are compared with; the first one unless given
    # Seconds at which runs are compared; each stands for the five seconds of video that end there.
    moments: tuple[float, ...] = (5.0, 30.0, 60.0)

    def __post_init__(self) -> None:
        for key in ("samples", "batch", "threads", "num_prompts"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: give 1 or more")
        for key, value in (("seconds", self.seconds), ("segment_seconds", self.segment_seconds)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{key}={value}: give a length above 0")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf={self.crf}: give 0 (lossless) to 51 (smallest)")
        if not self.metrics:
            raise ValueError(f"metrics is empty: give at least one of {', '.join(GROUPS)}")
        for group in self.metrics:
            choose(dict.fromkeys(GROUPS), group, what="group of metrics")
        if any(not (math.isfinite(moment) and moment > 0) for moment in self.moments):
            raise ValueError(f"moments={list(self.moments)}: give times in seconds above 0")
        if self.caches is not None:
            self._check_caches(self.caches)

    def _check_caches(self, caches: Mapping[str, Any]) -> None:
        if not caches:
            raise ValueError("caches is empty: name at least one cache policy; `longtake policies` lists them")
        for label in caches:
            if not isinstance(label, str) or not LABEL.fullmatch(label):
                raise ValueError(f"label {label!r} names a folder: use letters, digits, '.', '_', '+' and '-'")
        if self.baseline is not None and self.baseline not in caches:
            hint = did_you_mean(self.baseline, caches)
            raise ValueError(f"baseline {self.baseline!r} is none of the runs: {', '.join(caches)}.{hint}")

    def as_mapping(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """Everything that the numbers depend on, without names and places."""
        left_out = _PLACES
        if self.videos is not None:
            left_out = left_out | (_GENERATION - {"threads", "device"})
            left_out |= {"caches", "prompts_sha256", "dimensions", "samples", "segment_seconds"}
        return {key: value for key, value in self.as_mapping().items() if key not in left_out}

    def fingerprint(self) -> str:
        return _hash(self.identity())

    def config_hash(self, label: str) -> str:
        """Hash of what a video of one policy depends on beside prompt and seed."""
        values = self.as_mapping()
        return _hash({key: values[key] for key in _GENERATION} | {"cache": (self.caches or {})[label]})


def protocol_names() -> list[str]:
    """Names of the protocols under ``configs/eval``."""
    folder = files("longtake.configs") / "eval"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_protocol(source: str | Path | None = None, *, options: Mapping[str, Any] | None = None) -> Protocol:
    """Put a protocol together: a YAML file or one of :func:`protocol_names`, then options over it.

    ``source`` None is ``standard``; options that are None are left out.
    """
    given = {key: value for key, value in (options or {}).items() if value is not None}
    name = str(source if source is not None else "standard")
    values = _read(name)
    before = Protocol().as_mapping() | values
    for key in given.keys() & _HASHES.keys():
        if before[key] != given[key]:
            values.pop(_HASHES[key], None)
    values |= given
    if isinstance(values.get("caches"), Sequence) and not isinstance(values["caches"], str):
        values["caches"] = dict(_parse_cache(entry) for entry in values["caches"])
    if values.get("videos") is not None:
        values["caches"] = None
    # A baseline from the file goes with the file's policies.
    if "baseline" not in given and values.get("baseline") not in (values.get("caches") or {}):
        values.pop("baseline", None)
    return build(Protocol, values, what=f"protocol {name!r}")


def _parse_cache(entry: Any) -> tuple[str, Any]:
    """Read ``NAME``, ``LABEL={policy: NAME, field: value}`` or ``{LABEL: cache}`` into (label, entry)."""
    if isinstance(entry, Mapping) and len(entry) == 1:
        return next(iter(entry.items()))
    label, equals, text = entry.partition("=") if isinstance(entry, str) else ("", "", "")
    try:
        values = yaml.safe_load(text) if equals else label.strip()
    except yaml.YAMLError as error:
        raise ValueError(f"cache {entry!r}: {text!r} is no YAML: put it into quotes") from error
    if not values or not (isinstance(values, str) or isinstance(values, Mapping) and "policy" in values):
        raise ValueError(f"cache {entry!r}: write NAME or 'LABEL={{policy: NAME, field: value}}'")
    return label.strip(), values


def split_caches(texts: Sequence[str]) -> list[str]:
    """Split ``full,pack,deep={policy: deep_forcing, num_sink_frames: 6}`` at the commas between policies."""
    parts, depth = [""], 0
    for letter in ",".join(texts):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def split_entry(entry: Any) -> tuple[Any, Any]:
    """Cache policy and attention policy of an entry, both as ``longtake generate`` takes them."""
    if not isinstance(entry, Mapping):
        return entry, "dense"
    return {key: value for key, value in entry.items() if key != ATTENTION}, entry.get(ATTENTION) or "dense"


def resolve_generation(protocol: Protocol) -> Protocol:
    """Fill in the hash of the model and all fields of the policies."""
    from longtake.pipelines.run_folder import weights_hash

    if protocol.caches is None:
        raise ValueError("no cache policy is given: name some with --cache; `longtake policies` lists them")
    if protocol.family is not None and protocol.model in family_names() and protocol.family != protocol.model:
        raise ValueError(f"family={protocol.family!r}: the bundled model {protocol.model!r} has its own: leave it out")
    family = protocol.family or (protocol.model if protocol.model in family_names() else FOLDER_FAMILY)
    settings = load_family(family)
    folder = model_folder(protocol.model)
    sha256 = weights_hash(folder)["sha256"]
    _check_hash("model", protocol.model, expected=protocol.model_sha256, found=sha256)
    block = max(settings.frames_per_block, settings.first_block_frames or 1)
    caches = {label: _resolve_entry(label, entry, frames_per_block=block) for label, entry in protocol.caches.items()}
    return replace(protocol, family=family, model_sha256=sha256, caches=caches)


def _resolve_entry(label: str, entry: Any, *, frames_per_block: int) -> dict[str, Any]:
    """Put an entry's settings over its presets, and refuse what cannot run.

    An entry that is dense gets no key ``attention``, so that its hash is that of an entry that never named one.
    """
    from longtake.pipelines.settings import RolloutSettings

    cache, attention = split_entry(entry)
    run = load_run(options={"cache": cache, ATTENTION: attention, "prompt": "any"})
    try:
        settings = RolloutSettings(cache=run.cache, attention=run.attention)
        settings.policy.check(frames_per_block)
        settings.check_backend()
    except ValueError as error:
        raise ValueError(f"cache {label!r}: {error}") from error
    return dict(run.cache) if settings.sparsity.is_dense else {**run.cache, ATTENTION: dict(run.attention)}


def model_folder(model: str) -> Path:
    """Folder of a model's weights; refuses one that is missing, and a family without bundled weights."""
    from longtake.pipelines.loading import check_model_folder

    if model in family_names():
        family = load_family(model)
        if family.folder is None:
            raise ValueError(
                f"model family {model!r} has no bundled weights: get them ({family.homepage}), then give the folder"
            )
        return Path(str(files("longtake.models"))) / family.folder
    check_model_folder(Path(model))
    return Path(model)


def resolve_backbones(protocol: Protocol) -> Protocol:
    """Fill in the hash of the file of backbones, or refuse one that is missing or another than the protocol's."""
    if protocol.backbones is None:
        return protocol
    path = Path(protocol.backbones)
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read the backbones {path}: {error.strerror}: give a .py or .yaml file") from error
    _check_hash("backbones", str(path), expected=protocol.backbones_sha256, found=sha256)
    return replace(protocol, backbones_sha256=sha256)


def settle(out: Path, protocol: Protocol) -> None:
    """Write a resolved protocol into its folder; refuse a folder that holds another one, with what differs."""
    path = out / PROTOCOL_FILE
    if path.is_file():
        differing = _difference(load_protocol(path), protocol)
        if differing:
            raise ValueError(
                f"{out} holds an evaluation with another protocol ({'; '.join(differing)}): use another --out, or "
                f"go on with --protocol {path}"
            )
    values = yaml.safe_dump(protocol.as_mapping(), sort_keys=False, allow_unicode=True, width=100)
    write_atomically(path, f"# fingerprint: {protocol.fingerprint()}\n{values}")


def _difference(old: Protocol, new: Protocol) -> list[str]:
    """List ``key: old -> new`` of what decides numbers and differs."""
    before, after = old.identity(), new.identity()
    keys = sorted(before.keys() | after.keys(), key=[item.name for item in fields(Protocol)].index)
    changed = [key for key in keys if before.get(key) != after.get(key)]
    return [f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}" for key in changed]


def check_prompts(protocol: Protocol, sha256: str) -> Protocol:
    """Fill in the hash of the list of prompts, or refuse another list than the protocol was made for."""
    _check_hash("prompts", protocol.prompts, expected=protocol.prompts_sha256, found=sha256)
    return replace(protocol, prompts_sha256=sha256)


def _check_hash(what: str, name: str, *, expected: str | None, found: str) -> None:
    if expected is not None and expected != found:
        raise ValueError(
            f"{what} {name}: sha256 is {found[:16]}..., the protocol was made for {expected[:16]}...: give the same "
            f"{what}, or take {what}_sha256 out of the protocol"
        )


def _read(name: str) -> dict[str, Any]:
    known = protocol_names()
    path = files("longtake.configs") / "eval" / f"{name}.yaml" if name in known else Path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        hint = did_you_mean(name, known)
        raise ValueError(f"cannot read the protocol {name}: {error}; bundled: {', '.join(known)}.{hint}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"the protocol {name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"the protocol {name} must be a mapping of keys to values")
    return dict(values)


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(values), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """The same for 60 and 60.0, which YAML and the command line give for one length."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
