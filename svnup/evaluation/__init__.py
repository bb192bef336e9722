"""Perplexity and zero-shot accuracy, each with its protocol, and the gate for known dense perplexities."""

from svnup.evaluation.ppl import perplexity

__all__ = ["perplexity"]
