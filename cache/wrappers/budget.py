"""Any policy, within a number of bytes."""

import logging
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from longtake.cache.base import CachePolicy, Geometry, PolicyState
from longtake.cache.footprint import footprint
from longtake.cache.wrappers.quantized import BITS, Quantized
from longtake.cache.wrappers.wrapper import Wrapper

logger = logging.getLogger(__name__)
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Budget(Wrapper):
    """A policy as it is if it fits, else with fewer bits per number, else with a shorter window as well.

    Counted are stored tokens and assembled read sets of one guidance branch. Bits go first: eight of them cost half a
    percent of error per token, a window's frames are gone for good. The choice is logged when a rollout starts.
    """

    name: ClassVar[str] = "budget"
    source: ClassVar[str] = "longtake"

    max_bytes: int | str = "4GB"  # a number, or one with KB, MB, GB, MiB, GiB, ...
    min_bits: int = 8  # 16 never encodes, 4 is the last resort

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_bits not in BITS:
            raise ValueError(f"min_bits={self.min_bits} has no codec: use 4, 8 or 16 (never encode).")
        if self.num_bytes < 1:
            raise ValueError(f"max_bytes={self.max_bytes!r} must be 1 or more.")

    @property
    def num_bytes(self) -> int:
        """``max_bytes`` as a number."""
        size = parse_bytes(str(self.max_bytes))
        if size is None:
            raise ValueError(f"max_bytes={self.max_bytes!r} is no size: write a number, or for example 4GB or 900MiB.")
        return size

    def start(self, geometry: Geometry) -> PolicyState:
        return self.choose(geometry).start(geometry)

    def chosen(self, geometry: Geometry) -> CachePolicy:
        """The policy that ``choose`` takes, and what budgets inside of it choose."""
        return self.choose(geometry).chosen(geometry)

    def choose(self, geometry: Geometry) -> CachePolicy:
        """The first policy that fits, of those tried in order; ``ValueError`` says what the smallest would take."""
        self.inner.check(geometry.frames_per_block, geometry.max_frames)
        for policy in self._encoded(self.inner):
            size = footprint(policy, geometry).budgeted
            if size <= self.num_bytes:
                return self._chosen(policy, size)
        smaller = list(self._shorter(policy, geometry))
        sizes: dict[int, int] = {}

        def size_of(index: int) -> int:
            sizes[index] = footprint(smaller[index], geometry).budgeted
            return sizes[index]

        best = bisect_right(range(len(smaller)), self.num_bytes, key=size_of) - 1
        if best >= 0:
            return self._chosen(smaller[best], sizes[best])
        least = size_of(0) if smaller else size
        raise ValueError(
            f"max_bytes={self.max_bytes!r} is too little for cache policy {self.inner.name!r}: the least it takes is "
            f"{_said(least)} with min_bits={self.min_bits}. Give more, or fewer bits, or another policy."
        )

    def _chosen(self, policy: CachePolicy, size: int) -> CachePolicy:
        level = logging.INFO if policy == self.inner else logging.WARNING
        logger.log(level, "max_bytes=%s: taking %s, %s", self.max_bytes, policy.settings(), _said(size))
        return policy

    def _encoded(self, policy: CachePolicy) -> Iterator[CachePolicy]:
        """As it is, then with fewer and fewer bits."""
        yield policy
        if not _is_encoded(policy):
            for bits in sorted(BITS, reverse=True)[1:]:
                if bits >= self.min_bits:
                    yield Quantized(inner=policy, bits=bits)

    @staticmethod
    def _shorter(policy: CachePolicy, geometry: Geometry) -> Iterator[CachePolicy]:
        """Shorter windows that have room for a block, shortest first."""
        for window in range(1, _window(policy) or 1):
            try:
                candidate = _resized(policy, window)
                candidate.check(geometry.frames_per_block, geometry.max_frames)
            except ValueError:
                continue
            yield candidate


def parse_bytes(text: str) -> int | None:
    """A number of bytes, or one with KB, MB, GB, MiB, GiB, ...; None if it is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        return None
    return int(float(match[1]) * UNITS[match[2].upper()])


def _is_encoded(policy: CachePolicy) -> bool:
    return isinstance(policy, Quantized) or (isinstance(policy, Wrapper) and _is_encoded(policy.inner))


def _window(policy: CachePolicy) -> int | None:
    if isinstance(policy, Wrapper):
        return _window(policy.inner)
    return policy.settings().get("num_context_frames")


def _resized(policy: CachePolicy, window: int) -> CachePolicy:
    if isinstance(policy, Wrapper):
        return replace(policy, inner=_resized(policy.inner, window))
    return replace(policy, num_context_frames=window)


def _said(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
