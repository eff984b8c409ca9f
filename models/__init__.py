"""diffusers' Wan transformer made causal, streaming VAE, checkpoint conversion and the bundled mini model."""
