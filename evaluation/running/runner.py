"""An evaluation from its protocol to its report, in a folder that any interruption leaves in order.

Layout of the folder of an evaluation that generates:

protocol.yaml                what is done; going on with another one is refused
LABEL/units/00000.json       a batch's videos are whole: their manifest lines, and what they cost
LABEL/videos/p0007-0.mp4     what was made, and what is measured
LABEL/scores/p0007-0.json    every metric on that video
LABEL/run.json               what the metrics mean, and what the run is
LABEL/manifest.jsonl, costs.json, results.json, and comparison.json, report.html above them: written at the end

Existing videos stay where they are; a single folder of them is a run whose files lie in the evaluation's own folder.
"""

import contextlib
import fcntl
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import IO, Any, Literal

from longtake.evaluation.records import RunScores, write_json, write_manifest
from longtake.evaluation.results import COSTS_FILE, RESULTS_FILE, RUN_FILE, load_run, results_json, run_record
from longtake.evaluation.running.launchers import Watcher, Worker, do_units, local_workers, ray_workers
from longtake.evaluation.running.plan import MANIFEST, UNITS, RunPlan, Unit, interleaved, plan_generation, read_json
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
from longtake.evaluation.running.worker import Setup

COMPARISON_FILE = "comparison.json"
REPORT_FILE = "report.html"
LOCK_FILE = ".lock"
LONGEST_WAIT = timedelta(days=365)
"""Ranks that are finished wait for the others: units of hours are no failure."""
Launcher = Literal["local", "torchrun", "ray"]
LAUNCHERS: tuple[Launcher, ...] = ("local", "torchrun", "ray")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked for.

    Attributes:
        protocol: As it was given; it is resolved here.
        out: Folder of the evaluation.
        keep_videos: Whether generated videos stay when they are measured; those that the report shows always do.
    """

    protocol: Protocol
    out: Path
    keep_videos: bool = True


class Evaluation:
    """A planned evaluation.

    Nothing is written before :meth:`opened`.

    Args:
        order: What is asked for.

    Raises:
        ValueError: If anything named in it is missing, cannot be read or does not fit.
    """

    def __init__(self, order: Order) -> None:
        self.out = order.out.absolute()
        self.keep_videos = order.keep_videos
        protocol = resolve_backbones(order.protocol)
        if protocol.videos is not None:
            self.protocol, self.runs = protocol, self._existing(protocol)
            labels = [run.label for run in self.runs]
            if protocol.baseline is not None and protocol.baseline not in labels:
                raise ValueError(f"baseline {protocol.baseline!r} is none of the runs: {', '.join(labels)}")
        else:
            self.protocol, self.runs = self._generated(protocol)
        self.units = interleaved(self.runs)

    @property
    def labels(self) -> list[str]:
        """Of the runs, in order."""
        return [run.label for run in self.runs]

    @property
    def baseline(self) -> str:
        """The run that the others are compared with."""
        return self.protocol.baseline or self.labels[0]

    @cached_property
    def header(self) -> dict[str, Any]:
        """What every run's results say of the evaluation."""
        return {
            "protocol": self.protocol.name,
            "fingerprint": self.protocol.fingerprint(),
            "settings": self.protocol.identity(),
        }

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Keep other processes out of the folder, check its protocol, and remove what a kill left half-written.

        Raises:
            ValueError: If another process works in it, or it holds another evaluation.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / LOCK_FILE).open("ab") as lock:
            _take(lock, self.out)
            settle(self.out, self.protocol)
            for run in self.runs:
                for path in run.folder.glob("*/.*.tmp*"):
                    path.unlink(missing_ok=True)
            yield

    def todo(self) -> list[Unit]:
        """Units that are not finished."""
        return [unit for unit in self.units if not unit.is_done(keep_videos=self.keep_videos)]

    def work(
        self, units: Sequence[Unit], workers: Sequence[Worker], watcher: Watcher, *, should_stop: Callable[[], bool]
    ) -> None:
        """Do some units.

        Raises:
            ValueError: The first failure.
        """
        # Workers may be in another folder.
        protocol = self.protocol
        if protocol.backbones is not None:
            protocol = replace(protocol, backbones=str(Path(protocol.backbones).absolute()))
        if protocol.videos is None and Path(protocol.model).exists():
            protocol = replace(protocol, model=str(model_folder(protocol.model).absolute()))
        setup = Setup(protocol=protocol, keep_videos=self.keep_videos, units=units)
        do_units(units, setup, workers, describe=self.describe, watcher=watcher, should_stop=should_stop)

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write down what is measured, or check that it is what earlier videos were measured with.

        Args:
            description: ``specs``, ``skipped`` and ``files``, from a worker.

        Raises:
            ValueError: If a run's folder holds scores of other metrics.
        """
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
                if not keys:
                    continue
                raise ValueError(
                    f"{run.folder} was begun with other metrics, weights or settings ({', '.join(keys)} differ): use "
                    "another --out"
                )

    def finish(self) -> list[RunScores]:
        """Write every run's manifest, costs and results, the comparison and the report.

        Returns:
            The runs.
        """
        for run in self.runs:
            lines = [line for unit in run.units for line in unit.finished_lines()]
            lines.sort(key=lambda line: (line.prompt_index, line.seed_index, line.id))
            write_manifest(run.folder / MANIFEST, lines)
        return write_results(self.out)

    def _existing(self, protocol: Protocol) -> list[RunPlan]:
        from longtake.evaluation.running.video_folder import plan_videos

        return plan_videos(
            Path(str(protocol.videos)),
            self.out,
            manifest=None if protocol.manifest is None else Path(protocol.manifest),
            prompt_file=None if protocol.prompt_file is None else Path(protocol.prompt_file),
            fps=protocol.fps,
            mixed_rates=protocol.mixed_rates,
            has_backbones=protocol.backbones is not None,
        )

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


def run_here(
    evaluation: Evaluation,
    watcher: Watcher,
    *,
    launcher: Launcher,
    num_workers: int | None,
    should_stop: Callable[[], bool],
) -> bool:
    """Do what is left with worker processes or Ray actors, then write the results.

    Args:
        evaluation: What to do.
        watcher: Is told how it goes.
        launcher: ``local`` or ``ray``.
        num_workers: Processes; one per core, or as many as the cluster takes, when None.
        should_stop: Whether to begin no more units.

    Returns:
        Whether everything is finished.

    Raises:
        ValueError: If something does not fit or cannot be read; finished work is kept.
    """
    threads, is_cuda = evaluation.protocol.threads, evaluation.protocol.device == "cuda"
    with evaluation.opened():
        units = evaluation.todo()
        if units:
            if launcher == "ray":
                pool = ray_workers(num_workers, num_units=len(units), threads=threads, is_cuda=is_cuda)
            else:
                pool = local_workers(range(min(num_workers or num_cores(threads), len(units))), threads=threads)
            with pool as workers:
                evaluation.work(units, workers, watcher, should_stop=should_stop)
        if evaluation.todo():
            return False
        evaluation.finish()
        return True


def run_rank(evaluation: Evaluation, watcher: Watcher, *, should_stop: Callable[[], bool]) -> bool:
    """Do the units of one rank of ``torchrun``; ranks may be on several machines that share the folder.

    The first rank locks the folder, and writes the results when all are finished.

    Args:
        evaluation: What to do, the same on every rank.
        watcher: Is told how this rank's work goes.
        should_stop: Whether to begin no more units.

    Returns:
        Whether everything is finished.

    Raises:
        ValueError: If something does not fit or cannot be read; ``torchrun`` then ends the other ranks.
    """
    from torch import distributed

    # The processes that wait here compute nothing, so that they need no GPU.
    distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    rank, slot = distributed.get_rank(), int(os.environ["LOCAL_RANK"])
    with evaluation.opened() if rank == 0 else contextlib.nullcontext():
        distributed.barrier()
        units = [unit for unit in evaluation.todo() if unit.share % distributed.get_world_size() == rank]
        if units and not should_stop():
            with local_workers([slot], threads=evaluation.protocol.threads) as workers:
                evaluation.work(units, workers, watcher, should_stop=should_stop)
        if should_stop():
            return False
        distributed.barrier()
        if rank == 0:
            evaluation.finish()
        return True


def num_cores(threads: int = 1) -> int:
    """Processes that this machine has room for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def run_folders(out: Path) -> list[Path]:
    """The folders of an evaluation's runs: its own, or those below it; of a run's results, that run's.

    Raises:
        ValueError: If there are none.
    """
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
    """:func:`run_folders` in the order of the protocol.

    Raises:
        ValueError: If there are none.
    """
    order = list(settled_protocol(out).caches or {})
    key = {label: position for position, label in enumerate(order)}
    return sorted(run_folders(out), key=lambda folder: key.get(folder.name, len(order)))


def write_results(out: Path) -> list[RunScores]:
    """Write results, comparison and report of what has been measured so far.

    Args:
        out: Folder of an evaluation.

    Raises:
        ValueError: If it holds no runs, or none with a video.
    """
    folders = ordered_runs(out)
    protocol = load_protocol(out / PROTOCOL_FILE)
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
    labels = [run.label for run in runs]
    baseline = protocol.baseline if protocol.baseline in labels else labels[0]
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
    """Compare runs and write ``comparison.json`` and ``report.html``.

    Args:
        out: Folder to write to.
        runs: From :func:`longtake.evaluation.results.load_run`.
        baseline: Label of the run that the others are compared with.
        moments: Seconds; those behind the end of every video are left out.
        videos: {label: folder that the manifest's file names are relative to}.
        commands: What to type to get the same numbers.
        protocol: Of the runs, where they have one.

    Returns:
        The report.
    """
    from longtake.evaluation.comparison import REACH_SECONDS, compare_runs
    from longtake.evaluation.published import find_rows, load_published
    from longtake.evaluation.report import write_report

    lines = [video.video for run in runs for video in run.videos]
    longest = max((line.num_frames / line.fps for line in lines if line.fps), default=0.0)
    within = [moment for moment in moments if moment <= longest + REACH_SECONDS]
    comparison = compare_runs(runs, baseline=baseline, moments=within)
    write_json(out / COMPARISON_FILE, comparison)
    settings = {} if protocol is None else {"fingerprint": protocol.fingerprint(), **asdict(protocol)}
    return write_report(
        out,
        runs,
        comparison,
        commands=commands,
        protocol=settings,
        videos=videos,
        published=find_rows(load_published(), seconds=longest),
    )


def _deciding(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: item for key, item in value.items() if key not in ("tool", "protocol")}


def _take(lock: IO[bytes], out: Path) -> None:
    try:
        # Goes with the process, however that ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process works in {out}: stop it or wait") from error
