"""Baselines: everything of the main model but the encoder."""
