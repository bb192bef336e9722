"""How good a model is: perplexity and zero-shot accuracy under written-down protocols, and the gate for known dense numbers."""

from svnup.evaluation.ppl import perplexity

__all__ = ["perplexity"]
