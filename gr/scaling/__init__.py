"""Scaling laws: ladders of runs, fits of quality against compute, a prediction that can fail."""
