"""What all policies that take a policy have in common."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from longtake.cache.base import CachePolicy, Event, Geometry, PolicyState, Traits
from longtake.cache.coded import CodedStorage
from longtake.cache.policies.attention_sink import AttentionSink
from longtake.cache.storage import PlainStorage


@dataclass(frozen=True, kw_only=True)
class Wrapper(CachePolicy):
    """A policy around another one, which may be a wrapper itself.

    In YAML ``inner`` is a policy's name or its mapping.
    """

    inner: CachePolicy = field(default_factory=AttentionSink)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, CachePolicy):
            raise ValueError(
                f"inner={self.inner!r} of cache policy {self.name!r} is no policy: "
                "give its settings to make_policy, or a policy object."
            )

    @property
    def events(self) -> frozenset[Event]:
        """What a change of prompt may do: the inner policy's."""
        return self.inner.events

    @property
    def published_block(self) -> int:
        """Latent frames per block: the inner policy's."""
        return self.inner.published_block

    @property
    def published_window(self) -> int:
        """Blocks that are denoised together: the inner policy's."""
        return self.inner.published_window

    @property
    def traits(self) -> Traits:
        """Those of the inner policy."""
        return self.inner.traits

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Refuse what the inner policy refuses."""
        self.inner.check(frames_per_block, num_frames)

    def chosen(self, geometry: Geometry) -> CachePolicy:
        """The policy with what budgets inside of it choose."""
        return replace(self, inner=self.inner.chosen(geometry))

    @abstractmethod
    def start(self, geometry: Geometry) -> PolicyState:
        """Make the empty state of one rollout."""

    def settings(self) -> dict[str, Any]:
        """Name and fields, the inner policy's mapping among them."""
        return super().settings() | {"inner": self.inner.settings()}


def start_coded(policy: Wrapper, geometry: Geometry, change: Callable[[CodedStorage], CodedStorage]) -> PolicyState:
    """Start a wrapper's inner policy on changed storage.

    Args:
        policy: The wrapper.
        geometry: Of the rollout.
        change: From the storage as it is, without a codec at first, to the one wanted.

    Raises:
        ValueError: If the storage is none that can be changed, or the inner policy refuses the geometry.
    """
    storage = CodedStorage() if isinstance(geometry.storage, PlainStorage) else geometry.storage
    if not isinstance(storage, CodedStorage):
        raise ValueError(f"cache policy {policy.name!r} cannot change storage of {type(storage).__name__}: use plain.")
    state = policy.inner.start(replace(geometry, storage=change(storage)))
    state.keeps_read_sets = False
    return state
