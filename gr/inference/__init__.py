"""Scores and user vectors of a trained model, with cached histories (docs/inference.md)."""

from gr.inference.mfalcon import Scorer, Scores
from gr.inference.requests import Candidates, RequestEncoder, Requests

__all__ = ["Candidates", "RequestEncoder", "Requests", "Scorer", "Scores"]
