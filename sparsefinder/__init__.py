"""Predict which keys each query of a transformer will attend to, before any score is computed."""

__version__ = "0.1.0"
