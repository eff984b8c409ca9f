"""What a pipeline's takes are computed with, beside its components: numerics and the decoder of pixels."""

from pathlib import Path
from typing import Any, Self

from longtake.models import StreamingDecoder, TiledDecoder, VaePixels, streaming_decoder
from longtake.models.tiny_vae import StreamingTinyDecoder, TinyVae, load_tiny_vae
from longtake.models.upstream import Numerics, check_numerics


class TakeOptions:
    """Mixed into a Wan pipeline.

    Attributes:
        numerics: Where half precision is rounded in the transformer and between steps; see docs/models.md.
        tiny_vae: Decodes in place of ``vae`` where it is set, by ``use_fast_vae``; encoding stays with ``vae``.
    """

    numerics: Numerics = "native"
    tiny_vae: TinyVae | None = None

    @classmethod
    def from_pretrained(
        cls, *args: Any, numerics: Numerics = "native", fast_vae: str | Path | None = None, **kwargs: Any
    ) -> Self:
        """Load a pipeline; see the class that this is mixed into.

        Args:
            *args: As there.
            numerics: ``native`` or ``upstream``.
            fast_vae: For ``use_fast_vae``.
            **kwargs: As there.

        Raises:
            ValueError: If the name is unknown, or the file cannot be read or does not fit.
        """
        check_numerics(numerics)
        tiny_vae = None if fast_vae is None else load_tiny_vae(Path(fast_vae))
        pipe = super().from_pretrained(*args, **kwargs)
        pipe.numerics = numerics
        pipe.use_fast_vae(tiny_vae)
        return pipe

    def use_fast_vae(self, vae: TinyVae | str | Path | None) -> None:
        """Decode videos that are started from now on with a small decoder; None goes back to the VAE.

        Args:
            vae: A decoder, or its file: ``taew2_1.safetensors`` or ``.pth`` for Wan 2.1.

        Raises:
            ValueError: If the file cannot be read, or the decoder belongs to another VAE than the model's.
        """
        tiny_vae = load_tiny_vae(Path(vae)) if isinstance(vae, str | Path) else vae
        if tiny_vae is not None:
            layout, config = tiny_vae.layout, self.transformer.config
            compared = (
                ("channels in a latent", layout.latent_channels, config.in_channels),
                ("pixel frames to a latent frame", layout.frames_per_latent, self.vae_scale_factor_temporal),
                ("pixels to a latent position's side", layout.pixels_per_latent, self.vae_scale_factor_spatial),
            )
            for what, its, wanted in compared:
                if its != wanted:
                    raise ValueError(
                        f"the fast VAE has {its} {what}, this model has {wanted}: it was made for another VAE; leave "
                        "it out, or give the one of this model."
                    )
            tiny_vae.to(dtype=self.vae.dtype)
        self.tiny_vae = tiny_vae

    def pixel_stream(self) -> tuple[StreamingDecoder | TiledDecoder | StreamingTinyDecoder, VaePixels | TinyVae]:
        """A new stream of pixels, and what brings latents into the form that it takes (``denormalise``)."""
        if self.tiny_vae is None:
            return streaming_decoder(self.vae), VaePixels(self.vae)
        tiny_vae = self.tiny_vae.to(self._execution_device)
        return StreamingTinyDecoder(tiny_vae), tiny_vae
