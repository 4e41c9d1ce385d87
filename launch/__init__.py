"""Submitting jobs: sweeps and TorchX components."""
