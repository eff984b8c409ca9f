"""Backbones: frozen networks, or stand-ins for them, behind one of six small interfaces."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from longtake.configs.fields import did_you_mean


class Backbone(Protocol):
    """Facts of all backbones."""

    @property
    def name(self) -> str:
        """Part of the names of the metrics that use it."""
        ...

    @property
    def weights_sha256(self) -> str | None:
        """Hash of its weights file; None where it has none."""
        ...

    @property
    def official(self) -> bool:
        """Whether it is the network, with the weights, that VBench uses in this place."""
        ...


class FrameEncoder(Backbone, Protocol):
    """Frames to vectors: DINO, CLIP, DINOv2, DreamSim."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float, after the role's transform -> (B, D) float32, not normalised."""
        ...


class AestheticHead(Backbone, Protocol):
    """The LAION head on CLIP ViT-L/14 features."""

    def rate(self, features: Tensor) -> Tensor:
        """(B, 768) float, of length 1 -> (B, 1) float32, about 0..10."""
        ...

    def __call__(self, features: Tensor) -> Tensor:
        """The same."""
        ...


class FrameScorer(Backbone, Protocol):
    """A frame to a number: MUSIQ."""

    def score(self, image: Tensor) -> float:
        """(1, 3, h, w) float in 0..1 -> a number, for MUSIQ 0..100."""
        ...


class FlowEstimator(Backbone, Protocol):
    """Two frames to optical flow: RAFT."""

    def flow(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (1, 3, H, W) float in 0..255 -> (2, H, W) float32, x then y, in pixels.

        What is at p in ``a`` is at p + flow(p) in ``b``. The size is the input's, whatever padding was done to it.
        """
        ...


class Interpolator(Backbone, Protocol):
    """Two frames to the frame in the middle: AMT."""

    def middle(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (1, 3, H, W) float in 0..1 -> the frame half-way, same shape, float32."""
        ...


class VideoTextScorer(Backbone, Protocol):
    """Clips and texts to vectors of one space: ViCLIP."""

    def encode_video(self, clips: Tensor) -> Tensor:
        """(B, 8, 3, 224, 224) float, after the CLIP transform -> (B, D) float32, not normalised."""
        ...

    def encode_text(self, text: str) -> Tensor:
        """A text -> (1, D) float32, not normalised."""
        ...


@dataclass(frozen=True, kw_only=True)
class Role:
    """A place in the metrics that a backbone fills."""

    kind: type
    official: str  # what VBench has in this place
    aliases: tuple[str, ...] = ()  # other names under which a file of factories may offer it


ROLES: dict[str, Role] = {
    "dino": Role(kind=FrameEncoder, official="DINO ViT-B/16 (dino_vitbase16_pretrain.pth)"),
    "clip": Role(kind=FrameEncoder, official="CLIP ViT-B/32 (ViT-B-32.pt)"),
    "aesthetic_clip": Role(kind=FrameEncoder, official="CLIP ViT-L/14 (ViT-L-14.pt)", aliases=("clipl14",)),
    "aesthetic_head": Role(kind=AestheticHead, official="LAION aesthetic head (sa_0_4_vit_l_14_linear.pth)"),
    "musiq": Role(kind=FrameScorer, official="MUSIQ-SPAQ (musiq_spaq_ckpt-358bb6af.pth)"),
    "raft": Role(kind=FlowEstimator, official="RAFT (raft-things.pth, 20 iterations)"),
    "amt": Role(kind=Interpolator, official="AMT-S (amt-s.pth)"),
    "viclip": Role(kind=VideoTextScorer, official="ViCLIP (ViClip-InternVid-10M-FLT.pth)"),
    "dinov2": Role(kind=FrameEncoder, official="DINOv2 ViT-B/14 (dinov2_vitb14_pretrain.pth)", aliases=("dino2",)),
    "dreamsim": Role(kind=FrameEncoder, official="DreamSim (ensemble)"),
}
"""Every role, under the name that files and ``Backbones.get`` use."""


@dataclass(frozen=True)
class Backbones:
    """The backbones of one evaluation, by role."""

    found: Mapping[str, Any] = field(default_factory=dict)  # {role: backbone}
    # {file name: SHA-256} of the files they were made from, to be recorded with the results
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in self.found:
            check_role(role)

    @property
    def names(self) -> dict[str, str]:
        """{role: name of its backbone} of the roles that are filled."""
        return {role: self.found[role].name for role in ROLES if role in self.found}

    def get(self, role: str) -> Any | None:
        """The backbone of a role, None if there is none.

        Where there is no ``aesthetic_clip``, the ``clip`` stands in for it, and is not official there.
        """
        check_role(role)
        backbone = self.found.get(role)
        if backbone is None and role == "aesthetic_clip" and "clip" in self.found:
            backbone = replace(self.found["clip"], official=False)
        return backbone

    def why_missing(self, role: str) -> str:
        """Reason for an empty role, and how to fill it."""
        return f"no backbone for {role!r}: needs {ROLES[role].official}, given in a file of backbones"


def check_role(role: str) -> None:
    """Refuse a role that does not exist; the error names the nearest."""
    if role not in ROLES:
        raise ValueError(f"unknown backbone role {role!r}; known: {', '.join(ROLES)}.{did_you_mean(role, ROLES)}")
