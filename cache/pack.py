"""Sinks in full, the middle compressed and chosen from, the last frames in full."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import CachePolicy, Geometry
from longtake.cache.compressors import cell_factors, load_compressor, num_cells
from longtake.cache.pack_state import PackState

ENCODED = ("lr", "hr", "hr+lr")


@dataclass(frozen=True, kw_only=True)
class Pack(CachePolicy):
    """Sinks, a compressed middle and recent frames (PackForcing, arXiv:2603.25730).

    Each block that is no sink is stored twice when it is committed: in full, and compressed into a bank. When it is
    no longer recent the full version is dropped. Before a block's first step the ``num_selected_blocks`` best
    compressed blocks are chosen, per layer and sample, and every read frame gets a packed position: recent frames
    stand where they are, chosen blocks directly before them, sinks directly before those.

    ``compressor``: ``none`` stores the middle in full (retrieval); ``pool`` stores means of un-rotated keys and values
    over cells of 2 frames by 4x4 tokens; ``lr`` decodes the block, averages pixels over the same cells, encodes and
    runs the small clip through the transformer at timestep 0; ``hr`` does so with tokens of a trained network;
    ``hr+lr`` with their sum. ``none``, ``pool`` and ``lr`` need no training. ``selection``: ``query_score`` is the
    paper's sum of query-key products, exactly; ``softmax_mass`` the attention candidates would get; ``recency`` the
    newest.

    Published sizes are the defaults and suit blocks of 4 frames (182 tokens each). Counts of frames are rounded up to
    whole blocks. A block of 3 frames becomes 1 in time, one of 1 stays 1.

    What differs: no code was released. Compressed tokens run through the whole transformer and see the sinks, the bank
    and older recent frames, not their own block in full; the selection is per sample; products are of un-rotated
    queries and keys; the bank's cap and the coordinates inside a compressed block (centres of cells) are ours.
    """

    name: ClassVar[str] = "pack"
    source: ClassVar[str] = "PackForcing, arXiv:2603.25730"
    published_block: ClassVar[int] = 4

    num_sink_frames: int = 8  # first frames, in full for ever
    num_recent_frames: int = 4  # last frames before the block, in full
    num_selected_blocks: int = 16  # compressed blocks that a block reads
    num_archive_blocks: int = 128  # two minutes of blocks of 4; the oldest goes first
    compressor: Literal["none", "pool", "lr", "hr", "hr+lr"] = "pool"
    compressor_weights: str | None = None  # mini, or a file; for hr
    cell: tuple[int, int, int] = (2, 4, 4)  # frames, rows, columns of tokens that become one
    selection: Literal["query_score", "softmax_mass", "recency"] = "query_score"
    num_scored_heads: int | None = None  # None: all; the paper: half of them
    positions: Literal["packed", "absolute"] = "packed"
    spatial: Literal["scaled", "compact"] = "scaled"  # rows and columns of cells: centres in the full grid, or 0, 1, 2
    mid_span: float | None = None  # positions that a compressed block takes up at most; None: its frames
    archive: Literal["device", "host"] = "device"  # where the bank lies
    is_count_biased: bool = False  # adds log(tokens per cell) to the scores of cells

    def __post_init__(self) -> None:
        for name, least in (("num_sink_frames", 0), ("num_recent_frames", 0), ("num_selected_blocks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        if self.num_archive_blocks < self.num_selected_blocks:
            raise ValueError(
                f"num_archive_blocks={self.num_archive_blocks} holds fewer than num_selected_blocks="
                f"{self.num_selected_blocks}: use {self.num_selected_blocks} or more, or select fewer."
            )
        if min(self.cell) < 1:
            raise ValueError(f"cell={self.cell} (frames, rows, columns) must be 1 or more each.")
        if self.mid_span is not None and self.mid_span <= 0:
            raise ValueError(f"mid_span={self.mid_span} must be above 0, or null for the frames of a block.")
        if self.num_scored_heads is not None and self.num_scored_heads < 1:
            raise ValueError(f"num_scored_heads={self.num_scored_heads} must be 1 or more, or null for all.")
        if "hr" in self.compressor and not self.compressor_weights:
            raise ValueError(
                f"compressor={self.compressor!r} needs compressor_weights: 'mini' for the bundled model, or a file of "
                "scripts/train_compressor.py; without training use 'lr' or 'pool'."
            )

    @property
    def needs_vae(self) -> bool:
        """Pixels are pooled for ``lr``."""
        return "lr" in self.compressor

    @property
    def weighs_tokens(self) -> bool:
        """Cells may count for the tokens they stand for."""
        return self.is_count_biased

    @property
    def breaks_frames(self) -> bool:
        """Compressed blocks are read beside whole ones."""
        return self.compressor != "none"

    @property
    def needs_weights(self) -> bool:
        """The network of ``hr`` is trained for its model."""
        return "hr" in self.compressor

    @property
    def is_encoded(self) -> bool:
        """Whether compressed blocks run through the transformer."""
        return self.compressor in ENCODED

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Every block size fits: counts are rounded up to whole blocks."""

    def factors(self, geometry: Geometry) -> tuple[int, int, int]:
        """Frames, rows and columns that become one."""
        size = geometry.frames_per_block, geometry.num_rows, geometry.num_columns
        return (1, 1, 1) if self.compressor == "none" else cell_factors(size, self.cell)

    def cells(self, geometry: Geometry) -> tuple[int, int, int]:
        """Frames, rows and columns of a compressed block: 2, 7, 13 at 832x480 with blocks of 4."""
        size = geometry.frames_per_block, geometry.num_rows, geometry.num_columns
        return num_cells(size, self.factors(geometry))

    def start(self, geometry: Geometry) -> PackState:
        """Make the empty state of one rollout.

        Raises:
            ValueError: If the compressor's weights are missing.
        """
        network = None
        if self.compressor_weights is not None and self.needs_weights:
            network = load_compressor(self.compressor_weights, self.compressor, geometry.device)
        return PackState(self, geometry, network)
