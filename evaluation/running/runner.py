"""An evaluation from its protocol to its report, in a folder that any interruption leaves in order.

Layout of the folder of an evaluation that generates:

protocol.yaml                settings; going on with others is refused
LABEL/units/00000.json       manifest lines and costs of a batch, written when its videos are whole
LABEL/videos/p0007-0.mp4     a video that was made and is measured
LABEL/scores/p0007-0.json    every metric on that video
LABEL/run.json               meaning of the metrics, settings of the run
LABEL/manifest.jsonl, costs.json, results.json, and comparison.json, report.html above them: written at the end

Existing videos stay where they are; a single folder of them is a run whose files lie in the evaluation's own folder.
"""

import contextlib
import fcntl
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from longtake.evaluation.records import MANIFEST, RunScores, read_json, write_json, write_manifest
from longtake.evaluation.results import COSTS_FILE, RESULTS_FILE, RUN_FILE, load_run, results_json, run_record
from longtake.evaluation.running.plan import UNITS, RunPlan, Unit, interleaved, plan_generation, plan_videos
from longtake.evaluation.running.protocol import (
    PROTOCOL_FILE,
    Protocol,
    check_prompts,
    load_protocol,
    model_folder,
    resolve_backbones,
    resolve_generation,
    settle,
)
from longtake.evaluation.running.suites import load_prompts, prompts_sha256

_LOCK_FILE = ".lock"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings of every worker: the resolved protocol with absolute paths, and all units, to be checked beforehand."""

    protocol: Protocol
    keep_videos: bool
    units: Sequence[Unit]


class Evaluation:
    """A planned evaluation, its protocol resolved; nothing is written before :meth:`opened`.

    Without ``keep_videos`` generated videos go when they are measured, but for those that the report shows.
    """

    def __init__(self, protocol: Protocol, out: Path, *, keep_videos: bool = True) -> None:
        self.out = out.absolute()
        self.keep_videos = keep_videos
        protocol = resolve_backbones(protocol)
        if protocol.videos is not None:
            self.protocol, self.runs = protocol, self._existing(protocol, protocol.videos)
            choose_baseline(self.runs, protocol.baseline)
        else:
            self.protocol, self.runs = self._generated(protocol)
        self.units = interleaved(self.runs)

    @property
    def labels(self) -> list[str]:
        return [run.label for run in self.runs]

    @cached_property
    def header(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol.name,
            "fingerprint": self.protocol.fingerprint(),
            "settings": self.protocol.identity(),
        }

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Keep other processes out of the folder, check its protocol, and remove what a kill left half-written."""
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / _LOCK_FILE).open("ab") as lock:
            try:
                # Goes with the process, however that ends.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process works in {self.out}: stop it or wait") from error
            settle(self.out, self.protocol)
            for run in self.runs:
                for path in run.folder.glob("*/.*.tmp*"):
                    path.unlink(missing_ok=True)
            yield

    def todo(self) -> list[Unit]:
        return [unit for unit in self.units if not unit.is_done(keep_videos=self.keep_videos)]

    def setup(self, units: Sequence[Unit]) -> Setup:
        protocol = self.protocol
        if protocol.backbones is not None:
            protocol = replace(protocol, backbones=str(Path(protocol.backbones).absolute()))
        if protocol.videos is None and Path(protocol.model).exists():
            protocol = replace(protocol, model=str(model_folder(protocol.model).absolute()))
        return Setup(protocol=protocol, keep_videos=self.keep_videos, units=units)

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write down a worker's ``specs``, ``skipped`` and ``files``, or refuse folders with scores of others."""
        for run in self.runs:
            header = self.header | {"backbone_files": description["files"], "policy": dict(run.policy)}
            record = run_record(run.label, header, description["specs"], description["skipped"])
            known = read_json(run.folder / RUN_FILE)
            if known is None:
                write_json(run.folder / RUN_FILE, record)
            elif known != record:
                # Another version of the program may go on, or a protocol of another name that asks for the same; the
                # results name those that began.
                keys = [key for key in record if _deciding(known[key]) != _deciding(record[key])]
                if keys:
                    raise ValueError(
                        f"{run.folder} was begun with other metrics, weights or settings ({', '.join(keys)} differ): "
                        "use another --out"
                    )

    def finish(self) -> None:
        for run in self.runs:
            lines = [line for unit in run.units for line in unit.finished_lines()]
            lines.sort(key=lambda line: (line.prompt_index, line.seed_index, line.id))
            write_manifest(run.folder / MANIFEST, lines)
        write_results(self.out)

    def _existing(self, protocol: Protocol, videos: str) -> list[RunPlan]:
        manifest, prompt_file = (
            None if path is None else Path(path) for path in (protocol.manifest, protocol.prompt_file)
        )
        mixed_rates = protocol.backbones is not None if protocol.mixed_rates is None else protocol.mixed_rates
        options = {"manifest": manifest, "prompt_file": prompt_file, "fps": protocol.fps, "mixed_rates": mixed_rates}
        return plan_videos(Path(videos), self.out, **options)

    def _generated(self, protocol: Protocol) -> tuple[Protocol, list[RunPlan]]:
        prompts = load_prompts(
            protocol.prompts,
            extended=protocol.prompts_extended,
            count=protocol.num_prompts,
            dimensions=protocol.dimensions,
            segment_seconds=protocol.segment_seconds,
            seconds=protocol.seconds,
        )
        protocol = check_prompts(replace(protocol, num_prompts=len(prompts)), prompts_sha256(prompts))
        protocol = resolve_generation(protocol)
        return protocol, plan_generation(protocol, prompts, self.out)


def run_folders(out: Path) -> list[Path]:
    """The folders of an evaluation's runs: its own, or those below it; of a run's results, that run's."""
    if out.name == RESULTS_FILE:
        out = out.parent
    if (out / RUN_FILE).is_file():
        return [out]
    folders = [path.parent for path in sorted(out.glob(f"*/{RUN_FILE}"))]
    if not folders:
        raise ValueError(f"{out} holds no run of an evaluation: make one with `longtake evaluate run --out {out}`")
    return folders


def settled_protocol(out: Path) -> Protocol:
    """The protocol of an evaluation's folder, or of the one above a run's; the standard one if neither has."""
    path = next((path for path in (out, out.absolute().parent) if (path / PROTOCOL_FILE).is_file()), None)
    return load_protocol(None if path is None else path / PROTOCOL_FILE)


def ordered_runs(out: Path) -> list[Path]:
    """:func:`run_folders` in the order of the protocol."""
    order = list(settled_protocol(out).caches or {})
    return sorted(
        run_folders(out), key=lambda folder: order.index(folder.name) if folder.name in order else len(order)
    )


def choose_baseline(runs: Sequence[RunScores | RunPlan], wanted: str | None, *others: str | None) -> str:
    """Label of the run that the others are compared with: the wanted one, else one of ``others``, else the first."""
    labels = [run.label for run in runs]
    if wanted is not None and wanted not in labels:
        raise ValueError(f"baseline {wanted!r} is none of the runs: {', '.join(labels)}")
    return next(label for label in (wanted, *others, labels[0]) if label in labels)


def write_results(out: Path) -> list[RunScores]:
    """Write results, comparison and report of what has been measured so far; refuses a folder without a video."""
    folders, protocol = ordered_runs(out), load_protocol(out / PROTOCOL_FILE)
    runs, videos = [], {}
    for folder in folders:
        _write_costs(folder)
        run = load_run(folder)
        if run.videos:
            write_json(folder / RESULTS_FILE, results_json(run))
            runs.append(run)
            videos[run.label] = folder
    if not runs:
        raise ValueError(f"no video of {out} has been measured: run `longtake evaluate run --out {out}` first")
    baseline = choose_baseline(runs, None, protocol.baseline)
    command = shlex.join(("longtake", "evaluate", "run", "--protocol", PROTOCOL_FILE, "--out", "OUT"))
    write_comparison(
        out, runs, baseline=baseline, moments=protocol.moments, protocol=protocol, videos=videos, commands=[command]
    )
    return runs


def _write_costs(folder: Path) -> None:
    """Medians over the units of a run: one made on a slower machine, or beside other work, moves none of them."""
    costs = [read_json(path)["costs"] for path in sorted((folder / UNITS).glob("[!.]*.json"))]
    if costs:
        write_json(folder / COSTS_FILE, {name: median(cost[name] for cost in costs) for name in costs[0]})


def write_comparison(
    out: Path,
    runs: Sequence[RunScores],
    *,
    baseline: str,
    moments: Sequence[float],
    videos: Mapping[str, Path],
    commands: Sequence[str],
    protocol: Protocol | None = None,
) -> Path:
    """Compare runs and write ``comparison.json`` and ``report.html``, whose path is returned.

    ``moments`` behind the end of every video are left out. ``videos`` is {label: folder that the manifest's file names
    are relative to}; ``commands`` are what to type to get the same numbers.
    """
    from longtake.evaluation.comparison import REACH_SECONDS, compare_runs
    from longtake.evaluation.published import find_rows, load_published
    from longtake.evaluation.report import write_report
    from longtake.evaluation.report.data import ReportData

    lines = [video.video for run in runs for video in run.videos]
    longest = max((line.num_frames / line.fps for line in lines if line.fps), default=0.0)
    within = [moment for moment in moments if moment <= longest + REACH_SECONDS]
    data = ReportData(
        runs=runs,
        comparison=compare_runs(runs, baseline=baseline, moments=within),
        commands=commands,
        protocol={} if protocol is None else {"fingerprint": protocol.fingerprint(), **asdict(protocol)},
        videos=videos,
        published=find_rows(load_published(), seconds=longest),
    )
    return write_report(out, data)


def _deciding(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: item for key, item in value.items() if key not in ("tool", "protocol")}
