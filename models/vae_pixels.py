"""Between a rollout's latents and the VAE's: scale, layout, and pooling by way of pixels."""

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional

from longtake.models.offload import execution_device
from longtake.models.streaming_vae import FRAMES_PER_LATENT, StreamingEncoder
from longtake.models.tiled_vae import streaming_decoder


class VaePixels:
    """A VAE as a rollout sees it: latents are (batch, frames, channels, height, width) with mean 0 and deviation 1.

    Args:
        vae: The Wan VAE, unmodified; its config has the latents' mean and deviation.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32).view(shape)
        self._std = torch.tensor(vae.config.latents_std, dtype=torch.float32).view(shape)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents as the VAE decodes them: (batch, channels, frames, height, width) on its device, in its dtype."""
        z = latents.transpose(1, 2).float()
        z = z * self._std.to(z.device) + self._mean.to(z.device)
        return z.to(execution_device(self.vae), self.vae.dtype)

    def normalise(self, z: Tensor) -> Tensor:
        """What the VAE encoded as a rollout keeps it: (batch, frames, channels, height, width) float32."""
        z = z.float()
        return ((z - self._mean.to(z.device)) / self._std.to(z.device)).transpose(1, 2)

    @torch.no_grad()
    def pool(self, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Decode latents as a clip of their own, average its pixels over cells, and encode the smaller clip.

        n latent frames become max(1, n // t). The encoder takes 1 + 4 k pixel frames, so the 1 + 4 (n - 1) decoded
        ones are averaged down to just that many evenly spaced, overlapping spans; rows and columns that fill no cell
        are left out.

        Args:
            latents: (batch, frames, channels, height, width), normalised.
            size: Pixel frames, rows and columns of a cell.

        Returns:
            (batch, frames // t or 1, channels, height / h, width / w), normalised, dtype and device of ``latents``.

        Raises:
            ValueError: If a cell is larger than the clip.

        Source: PackForcing, arXiv:2603.25730, low-resolution branch.
        """
        frames, rows, columns = size
        video = streaming_decoder(self.vae).decode(self.denormalise(latents))
        height, width = video.shape[-2] // rows, video.shape[-1] // columns
        step = self.vae.spatial_compression_ratio
        if min(height, width) < step:
            raise ValueError(
                f"pixels of {video.shape[-2]}x{video.shape[-1]} pooled by {rows}x{columns} are {height}x{width}, less "
                f"than the VAE's {step}x{step}: use a larger video or less pooling."
            )
        num_latents = max(1, latents.shape[1] // frames)
        num_frames = 1 + FRAMES_PER_LATENT * (num_latents - 1)
        video = video[..., : height * rows, : width * columns]
        small = functional.adaptive_avg_pool3d(video, (num_frames, height, width))
        return self.normalise(StreamingEncoder(self.vae).encode(small)).to(latents)
