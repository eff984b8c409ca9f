"""Stages of lab/train_mini.py: VAE, latents, transformer, export."""
