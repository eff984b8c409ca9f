"""Sparse attention in a cached rollout: says to a sparse policy which frames ask and which frames the cache gave."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longtake.attention import (
    EXECUTORS,
    AttentionGeometry,
    BackendUnavailable,
    Segment,
    SparsePolicy,
    make_attention_policy,
    sparse_attention,
)
from longtake.attention.density import DensityMeter
from longtake.cache import Call, Geometry, Run
from longtake.configs.fields import choose

BACKEND = "backend"
"""Key of an attention mapping that names an executor; the others are the policy's."""


class AttentionSetting:
    """The attention of a rollout: a sparse policy and how its plans are executed.

    Args:
        settings: ``{"policy": NAME, field: value, ..., "backend": NAME}``, a name alone, or a policy. ``backend`` is
            ``auto`` unless given.

    Raises:
        ValueError: If a name or a field is unknown, or a value does not fit.
    """

    def __init__(self, settings: SparsePolicy | Mapping[str, Any] | str = "dense") -> None:
        self.backend = "auto"
        if isinstance(settings, Mapping):
            settings = dict(settings)
            self.backend = settings.pop(BACKEND, self.backend)
        self.policy = make_attention_policy(settings)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is ever left out."""
        return self.policy.name == "dense"

    def check_backend(self) -> None:
        """Refuse a named backend that is unknown or cannot run on this machine.

        Raises:
            ValueError: If there is none of that name.
            BackendUnavailable: If it cannot run here; says what to do.
        """
        if self.backend == "auto":
            return
        verdict = choose(EXECUTORS, self.backend, what="attention backend").available()
        if not verdict.ok:
            raise BackendUnavailable(
                f"backend {self.backend!r} cannot run on this machine: {verdict.text}. {verdict.hint}".rstrip(),
                backend=self.backend,
                code=verdict.reasons[0].code,
                hint=verdict.hint,
            )


class SparseSelfAttention:
    """Attention of one cache over the blocks that a policy picks.

    What a policy keeps between calls (``Memory``) lasts for one block of the rollout, so that a rollout that is saved
    between two blocks and continued makes the same plans.

    Args:
        setting: Policy and backend.
        geometry: Shapes of the rollout.
        num_steps: Denoising steps of a block.
        meter: Counts what is planned; the branches of a rollout may share one.
    """

    def __init__(
        self, setting: AttentionSetting, geometry: Geometry, *, num_steps: int, meter: DensityMeter | None = None
    ) -> None:
        self.setting = setting
        self.geometry = geometry
        self.num_steps = num_steps
        self.meter = meter or DensityMeter(setting.policy)
        self._memory: dict[Any, Any] = {}
        self._segments: dict[Any, tuple[Segment, ...]] = {}
        self._block_index = -1

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, bias: Tensor | None) -> Tensor:
        """Attend; see ``longtake.cache.SparseAttention``.

        Raises:
            ValueError: If the cache weights its tokens, or gives heads different tokens under a policy that tells
                heads apart.
        """
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
        if call.pass_.block_index != self._block_index:
            self._block_index = call.pass_.block_index
            self._memory.clear()
            self._segments.clear()
        memory = self._memory.setdefault((call.layer, call.pass_.kind), {})
        return sparse_attention(
            q, k, v, self._geometry_of(call), policy=self.meter, memory=memory, backend=self.setting.backend
        )

    def _geometry_of(self, call: Call) -> AttentionGeometry:
        pass_, shapes = call.pass_, self.geometry
        frames = tuple(range(pass_.start_frame, pass_.start_frame + pass_.num_frames))
        key = (call.runs, call.query_positions, frames)
        if key not in self._segments:
            self._segments[key] = _segments(call.runs, frames, call.query_positions, shapes.tokens_per_frame)
        return AttentionGeometry(
            frame_tokens=shapes.tokens_per_frame,
            grid=(shapes.num_rows, shapes.num_columns),
            frames_per_block=shapes.frames_per_block,
            segments=self._segments[key],
            query_frames=frames,
            query_positions=call.query_positions,
            block_index=pass_.block_index,
            step_index=pass_.step_index,
            num_steps=self.num_steps,
            layer=call.layer,
            num_layers=shapes.num_layers,
            kind=pass_.kind,
        )


def _segments(
    runs: tuple[Run, ...], frames: tuple[int, ...], positions: tuple[float, ...], frame_tokens: int
) -> tuple[Segment, ...]:
    """Whole frames one by one; anything else (chosen tokens, averages, compressed cells) as a memory read whole."""
    segments: list[Segment] = []
    start = 0
    for run in runs:
        is_whole = len(run.frames) == len(run.positions) and run.num_tokens == len(run.positions) * frame_tokens
        if is_whole and run.role != "memory":
            for frame, position in zip(run.frames, run.positions, strict=True):
                segments.append(
                    Segment(frame=frame, position=position, start=start, length=frame_tokens, role=run.role)
                )
                start += frame_tokens
        elif run.num_tokens:
            position = sum(run.positions) / len(run.positions) if run.positions else 0.0
            segments.append(Segment(frame=-1, position=position, start=start, length=run.num_tokens, role="memory"))
            start += run.num_tokens
    for frame, position in zip(frames, positions, strict=True):
        segments.append(Segment(frame=frame, position=position, start=start, length=frame_tokens, role="current"))
        start += frame_tokens
    return tuple(segments)
