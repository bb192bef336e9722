"""Shapley-value based non-uniform pruning of language models (SV-NUP, arXiv 2505.01731)."""

__version__ = "0.1.0"

# Goes up with every entry under 'Numbers' in CHANGELOG.md: it is part of every config key, game key and cached value,
# so that a number measured by older code is never taken for one of this code.
NUMBERS_VERSION = 4
