"""The rollout: text to blocks to latents to pixels to a file."""
