"""Sparse attention in a cached rollout: a sparse policy over the frames that the cache gave."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor

from longtake.attention import (
    BACKENDS,
    AttentionGeometry,
    BackendUnavailable,
    Segment,
    SparsePolicy,
    make_attention_policy,
    sparse_attention,
)
from longtake.attention.geometry import Role
from longtake.attention.policies.base import DensityMeter
from longtake.cache import Call, Geometry, Run
from longtake.configs.fields import choose


class AttentionSetting:
    """The attention of a rollout: a sparse policy and the backend of its plans.

    Args:
        settings: ``{"policy": NAME, field: value, ..., "backend": NAME}``, a name alone, or a policy. ``backend`` is
            ``auto`` unless given.
    """

    def __init__(self, settings: SparsePolicy | Mapping[str, Any] | str = "dense") -> None:
        self.backend = "auto"
        if isinstance(settings, Mapping):
            settings = dict(settings)
            self.backend = settings.pop("backend", self.backend)
        self.policy = make_attention_policy(settings)

    @property
    def is_dense(self) -> bool:
        return self.policy.name == "dense"

    def check_backend(self) -> None:
        """Refuse a named backend that is unknown or cannot run on this machine.

        Raises:
            ValueError: If there is none of that name.
            BackendUnavailable: If it cannot run here; names the remedy.
        """
        if self.backend == "auto":
            return
        verdict = choose(BACKENDS, self.backend, what="attention backend").available()
        if not verdict.ok:
            raise BackendUnavailable(
                f"backend {self.backend!r} cannot run on this machine: {verdict.text}. {verdict.hint}".rstrip(),
                backend=self.backend,
                code=verdict.reasons[0].code,
                hint=verdict.hint,
            )


class SparseSelfAttention:
    """Attention of one cache over the blocks that a policy picks.

    The memory of a policy between calls lasts for one block of the rollout, so that a rollout that is saved between
    two blocks and continued makes the same plans. The branches of a rollout may share a meter.
    """

    def __init__(
        self, setting: AttentionSetting, geometry: Geometry, *, num_steps: int, meter: DensityMeter | None = None
    ) -> None:
        self.setting = setting
        self.geometry = geometry
        self.num_steps = num_steps
        self.meter = meter or DensityMeter(setting.policy)
        self._blocks: dict[int, _Block] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, bias: Tensor | None) -> Tensor:
        """Attend; see ``longtake.cache.SparseAttention``."""
        policy = self.setting.policy
        if bias is not None:
            raise ValueError(
                f"attention {policy.name!r} leaves blocks of keys out and this cache policy weights its tokens: "
                "use attention 'dense', or another cache policy."
            )
        if call.heads is not None and not policy.is_static:
            raise ValueError(
                f"attention {policy.name!r} chooses blocks by what is in the tokens of all heads, and this cache "
                "policy gives heads different tokens: use a policy that looks at positions alone, such as 'radial'."
            )
        block = self._block(call.pass_.block_index)
        memory = block.memory.setdefault((call.layer, call.pass_.kind), {})
        geometry = self._geometry_of(call, block.geometries)
        return sparse_attention(q, k, v, geometry, policy=self.meter, memory=memory, backend=self.setting.backend)

    def _block(self, index: int) -> "_Block":
        if index not in self._blocks:
            # A block's commit pass may run layer by layer with the first step of the next block: both are kept.
            self._blocks = {known: block for known, block in self._blocks.items() if known == index - 1}
            self._blocks[index] = _Block()
        return self._blocks[index]

    def _geometry_of(self, call: Call, known: dict[Any, AttentionGeometry]) -> AttentionGeometry:
        pass_, shapes = call.pass_, self.geometry
        frames = tuple(range(pass_.start_frame, pass_.start_frame + pass_.num_frames))
        key = (call.runs, call.query_positions, frames)
        if key not in known:
            known[key] = AttentionGeometry(
                frame_tokens=shapes.tokens_per_frame,
                grid=(shapes.num_rows, shapes.num_columns),
                frames_per_block=shapes.frames_per_block,
                segments=_segments(call.runs, frames, call.query_positions, shapes.tokens_per_frame),
                query_frames=frames,
                query_positions=call.query_positions,
                block_index=pass_.block_index,
                num_steps=self.num_steps,
                num_layers=shapes.num_layers,
            )
        kind = "commit" if pass_.kind == "commit" else "denoise"
        return known[key].at(step_index=pass_.step_index, layer=call.layer, kind=kind)


@dataclass
class _Block:
    memory: dict[tuple[int, str], dict[Any, Any]] = field(default_factory=dict)  # of the policy, by layer and pass
    geometries: dict[Any, AttentionGeometry] = field(default_factory=dict)  # by runs and positions, at any step


def _segments(
    runs: tuple[Run, ...], frames: tuple[int, ...], positions: tuple[float, ...], frame_tokens: int
) -> tuple[Segment, ...]:
    """Whole frames one by one; anything else (chosen tokens, averages, compressed cells) as a memory read whole.

    A role that only the cache policy knows is history.
    """
    segments: list[Segment] = []

    def add(frame: int, position: float, length: int, role: str) -> None:
        start = segments[-1].stop if segments else 0
        segments.append(Segment(frame=frame, position=position, start=start, length=length, role=role))

    for run in runs:
        is_whole = len(run.frames) == len(run.positions) and run.num_tokens == len(run.positions) * frame_tokens
        role = run.role if run.role in get_args(Role) else "mid"
        if is_whole and role != "memory":
            for frame, position in zip(run.frames, run.positions, strict=True):
                add(frame, position, frame_tokens, role)
        elif run.num_tokens:
            add(-1, sum(run.positions) / len(run.positions) if run.positions else 0.0, run.num_tokens, "memory")
    for frame, position in zip(frames, positions, strict=True):
        add(frame, position, frame_tokens, "current")
    return tuple(segments)
