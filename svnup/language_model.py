"""Public name: `from svnup.language_model import LanguageModel`."""

from svnup.model.language_model import LanguageModel

__all__ = ["LanguageModel"]
