"""Stages of scripts/train_mini.py: VAE, latents, transformer, export."""
