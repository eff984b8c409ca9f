"""Base of the policies that take a policy."""

from dataclasses import dataclass, field, replace
from typing import Any

from longtake.cache.base import CachePolicy, Event, Geometry, PolicyState, Traits
from longtake.cache.policies.attention_sink import AttentionSink
from longtake.cache.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Wrapper(CachePolicy):
    """A policy around another one, which may be a wrapper itself.

    In YAML ``inner`` is a policy's name or its mapping.
    """

    inner: CachePolicy = field(default_factory=AttentionSink)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, CachePolicy):
            raise ValueError(
                f"inner={self.inner!r} of cache policy {self.name!r} is no policy: "
                "give its settings to make_policy, or a policy object."
            )

    @property
    def events(self) -> frozenset[Event]:
        return self.inner.events

    @property
    def published_block(self) -> int:
        return self.inner.published_block

    @property
    def published_window(self) -> int:
        return self.inner.published_window

    @property
    def traits(self) -> Traits:
        return self.inner.traits

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        self.inner.check(frames_per_block, num_frames)

    def chosen(self, geometry: Geometry) -> CachePolicy:
        """The policy with what budgets inside of it choose."""
        return replace(self, inner=self.inner.chosen(geometry))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"inner": self.inner.settings()}

    def _start_coded(self, geometry: Geometry, storage: Storage) -> PolicyState:
        """Start the inner policy on other storage, whose read sets do not stay in memory."""
        state = self.inner.start(replace(geometry, storage=storage))
        state.keeps_read_sets = False
        return state
