"""Any policy, its tokens kept in the host's memory."""

from dataclasses import dataclass, replace
from typing import ClassVar

from longtake.cache.base import Geometry, PolicyState
from longtake.cache.wrappers.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class Offloaded(Wrapper):
    """Keys and values of any policy in the host's memory, fetched layer by layer (as LightX2V does).

    On CUDA the memory is pinned, and while a layer computes, the next layer's tokens come in on a stream of their own.
    A latent frame of Wan2.1-1.3B at 832x480 is 288 MB in bfloat16: 11.5 ms per pass at 25 GB/s, hidden only by slow
    compute or, mostly, with ``inner: {policy: quantized, bits: 4, ...}``.
    """

    name: ClassVar[str] = "offloaded"
    source: ClassVar[str] = "LightX2V, github.com/ModelTC/lightx2v"

    def start(self, geometry: Geometry) -> PolicyState:
        return self._start_coded(geometry, replace(geometry.storage, is_on_host=True))
