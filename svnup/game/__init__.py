"""The cooperative game between the blocks of a language model."""

from svnup.game.layer_game import LayerGame

__all__ = ["LayerGame"]
