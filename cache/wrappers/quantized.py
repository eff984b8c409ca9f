"""Any policy, its tokens kept in eight or four bits."""

from dataclasses import dataclass, replace
from typing import ClassVar

from longtake.cache.base import Geometry, PolicyState
from longtake.cache.coded import CodedStorage, Raw, codec_of
from longtake.cache.wrappers.wrapper import Wrapper, start_coded

BITS = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Quantized(Wrapper):
    """Keys and values of any policy in eight bits per number, or four (KV-cache quantisation study, arXiv:2603.27469).

    Eight bits: one scale per token and head. Four: one per group of channels. A token is encoded once, when it is
    committed, as the un-rotated key it is, and decoded layer by layer when it is read; moving, saving and loading
    handle codes. Groups never span tokens, so a window that moves on does not shift them, which in the study's
    methods (groups along tokens) means encoding again and again. A pass's own keys and values stay as they are.

    Read sets are built anew for every pass in one buffer for all layers: otherwise the decoded copies would take
    more memory than the codes save.
    """

    name: ClassVar[str] = "quantized"
    source: ClassVar[str] = "round to nearest, after arXiv:2603.27469 and Quant VideoGen, arXiv:2602.02958"

    bits: int = 8  # of keys
    value_bits: int | None = None  # null: as the keys; keys never have fewer than values
    group_size: int = 16  # channels per scale in four bits

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bits in (("bits", self.bits), ("value_bits", self.value_bits)):
            if bits is not None and bits not in BITS:
                raise ValueError(f"{name}={bits} has no codec: use 4, 8 or 16 (as they are).")
        if self.value_bits is not None and self.value_bits > self.bits:
            raise ValueError(
                f"value_bits={self.value_bits} is more than bits={self.bits}: errors of keys do more harm than errors "
                f"of values, so give keys {self.value_bits} bits or values {self.bits}."
            )
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} must be 2 or more channels.")

    def start(self, geometry: Geometry) -> PolicyState:
        """Make the inner policy's empty state on encoded storage.

        Raises:
            ValueError: If the tokens are encoded already, or the inner policy refuses the geometry.
        """
        return start_coded(self, geometry, self._change)

    def _change(self, storage: CodedStorage) -> CodedStorage:
        if storage.keys != Raw() or storage.values != Raw():
            raise ValueError("a quantized policy is inside another one: keep one of the two.")
        bits = (self.bits, self.bits if self.value_bits is None else self.value_bits)
        keys, values = (codec_of(number, group_size=self.group_size) for number in bits)
        return replace(storage, keys=keys, values=values)
