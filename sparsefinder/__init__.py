"""Predict which keys each query of a transformer will attend to, before any score is computed.

Importing it teaches transformers, before or after that is imported itself, what a model with entmax attention is.
"""

from sparsefinder.models.entmax_configuration import follow_transformers

__version__ = "0.1.0"

follow_transformers()
