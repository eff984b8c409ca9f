"""Which temporal positions a rollout uses, against those that its model has been trained at."""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class PositionUse:
    """Watches the positions of every block's reads, and warns once when they leave the trained range.

    Attention sees distances only, so what counts is how far apart the positions of one read are.

    Args:
        policy: Name of the cache policy, for the warning.
        num_trained_frames: Latent frames of the training clips: distances up to one less are known to the model.
    """

    def __init__(self, policy: str, num_trained_frames: int) -> None:
        self.policy = policy
        self.num_trained_frames = num_trained_frames
        self.last: tuple[float, float] | None = None
        self.reach = 0.0

    def see(self, positions: tuple[float, float] | None) -> None:
        """Take note of the lowest and highest position of a block's read."""
        if positions is None:
            return
        trained = self.num_trained_frames - 1
        was_within = self.reach <= trained
        self.last = positions
        self.reach = max(self.reach, positions[1] - positions[0])
        if was_within and self.reach > trained:
            logger.warning(
                "cache policy %r reads positions %g apart, this model was trained on clips of %d latent frames, which "
                "are at most %d apart: use a smaller context, or positions that do not grow.",
                self.policy,
                self.reach,
                self.num_trained_frames,
                trained,
            )

    def as_mapping(self) -> dict[str, Any]:
        """The last read's lowest and highest position, the largest distance so far, and the largest in training."""
        lowest, highest = self.last or (None, None)
        return {
            "lowest": lowest,
            "highest": highest,
            "largest_distance": self.reach,
            "trained_distance": self.num_trained_frames - 1,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``as_mapping`` gave."""
        self.last = None if saved["lowest"] is None else (saved["lowest"], saved["highest"])
        self.reach = saved["largest_distance"]
