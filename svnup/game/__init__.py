"""The cooperative games between the blocks of a language model, and between the experts of a block."""

from svnup.game.expert_game import ExpertGame
from svnup.game.layer_game import LayerGame

__all__ = ["ExpertGame", "LayerGame"]
