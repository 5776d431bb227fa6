"""Patterns: one idea a file, each ``(QK, layer) → graph``. A predictor and a fixed baseline are the same thing.

A pattern is a frozen dataclass whose fields are its settings. Two class attributes tell the rest of the package about it:
``sparsity_parameter`` names the one field that trades sparsity for recall (None: there is none), and ``needs`` names the
artefacts that it works with (``projections``, ``centroids``), which a `sparsefinder.experiment.configuration.Configuration`
attaches. A third, ``reads_ahead``, is there only where a pattern reads later tokens in causal attention, and says which: such
a pattern can be scored, but not be run in a causal language model.
"""
