"""MammoDINO in JAX: self-supervised pretraining of vision transformers on mammograms.

An independent, unofficial implementation of arXiv 2510.11883. Importing this package is cheap on purpose
(no jax, torch or tensorflow): data workers re-import it.
"""

__version__ = "0.1.0"
