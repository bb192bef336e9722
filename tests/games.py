"""Toy games with known Shapley values: `n_players`, `__call__(bool (m, n)) -> float64 (m,)`, closed form in `values`.

Trials of functions, and text that is given.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from svnup.allocation import Trial
from svnup.types import SparsityProfile


class Given:
    """A text of tokens (n_seq, seq_len) that are there."""

    def __init__(self, tokens):
        self._tokens = tokens

    def tokens(self, tokenizer):
        return self._tokens


class LossOf(Trial):
    """Trials whose loss is what a function of a profile, its label and a number of sequences makes up."""

    def __init__(self, function):
        self._function = function

    def loss(self, profile, label="", n_seq=None, in_advance=False):
        return self._function(profile, label, n_seq)

    def shapley_values(self, denser, sparser):
        """What each block's step from one profile to the other loses while the others stay: where losses add up, its value."""

        def at(sparsity):
            mean = float(np.average(sparsity, weights=denser.params))
            return self.loss(SparsityProfile(sparsity, denser.params, mean))

        alone = np.where(np.eye(len(denser.params), dtype=bool), sparser.sparsity, denser.sparsity)
        return np.array([at(row) for row in alone]) - at(denser.sparsity)

    def marginal_values(self, denser, sparser, first, n_seq, nodes=1):
        return self.shapley_values(denser, sparser)

    def misalignment(self, profile, label, n_seq):
        return self._function(profile, label, n_seq)


class Additive:
    """v(Q) = constant + sum of the weights of Q: everybody is a dummy, phi = weights."""

    def __init__(self, weights, constant=0.0):
        self.weights, self.constant = np.asarray(weights, dtype=np.float64), constant
        self.n_players = len(self.weights)
        self.values = self.weights

    def __call__(self, coalitions):
        return coalitions @ self.weights + self.constant


class Unanimity:
    """v(Q) = worth where Q contains the whole carrier, else 0: phi = worth / |carrier| for its members, 0 for the others."""

    def __init__(self, n_players, carrier, worth=1.0):
        self.n_players, self.carrier, self.worth = n_players, list(carrier), worth
        self.values = np.zeros(n_players)
        self.values[self.carrier] = worth / len(self.carrier)

    def __call__(self, coalitions):
        return np.where(coalitions[:, self.carrier].all(axis=1), self.worth, 0.0)


class Glove:
    """Player 0 has a left glove, the other r right ones, v = pairs: phi_0 = r / (r + 1), the others 1 / (r (r + 1))."""

    def __init__(self, n_right):
        self.n_players = n_right + 1
        self.values = np.full(self.n_players, 1 / (n_right * (n_right + 1)))
        self.values[0] = n_right / (n_right + 1)

    def __call__(self, coalitions):
        return np.minimum(coalitions[:, 0], coalitions[:, 1:].sum(axis=1)).astype(np.float64)


class Tabulated:
    """v(Q) = table[sum of 2^i over i in Q], with phi from the Harsanyi dividends: phi_i = sum_{T with i} d_T / |T|."""

    def __init__(self, table):
        self.table = np.asarray(table, dtype=np.float64)
        self.n_players = len(self.table).bit_length() - 1
        assert len(self.table) == 2**self.n_players

    @classmethod
    def random(cls, n_players, seed):
        return cls(np.random.default_rng(seed).normal(size=2**n_players))

    @property
    def values(self):
        dividends = self.table.copy()
        for player in range(self.n_players):
            has = np.arange(len(dividends)) >> player & 1 == 1
            dividends[has] -= dividends[~has]
        phi = np.zeros(self.n_players)
        for code in range(1, len(dividends)):
            members = [i for i in range(self.n_players) if code >> i & 1]
            phi[members] += dividends[code] / len(members)
        return phi

    def __call__(self, coalitions):
        return self.table[coalitions @ (1 << np.arange(self.n_players))]


class Combined:
    """a v + b w of two games of the same players."""

    def __init__(self, a, v, b, w):
        assert v.n_players == w.n_players
        self.a, self.v, self.b, self.w, self.n_players = a, v, b, w, v.n_players

    def __call__(self, coalitions):
        return self.a * self.v(coalitions) + self.b * self.w(coalitions)


class Ignoring:
    """A game to which one player makes no difference, or always the same one (`gift`)."""

    def __init__(self, game, player, gift=0.0):
        self.game, self.player, self.gift, self.n_players = game, player, gift, game.n_players

    def __call__(self, coalitions):
        without = coalitions.copy()
        without[:, self.player] = False
        return self.game(without) + self.gift * coalitions[:, self.player]


class Recorder:
    """A game that remembers every coalition that it was asked for."""

    def __init__(self, game):
        self.game, self.n_players = game, game.n_players
        self.asked = []

    def __call__(self, coalitions):
        assert coalitions.dtype == np.bool_
        assert coalitions.ndim == 2
        self.asked += [tuple(row) for row in coalitions.tolist()]
        return self.game(coalitions)


def average_over_orders(game, players=None, others_present=False):
    """Shapley values by their definition: mean marginal contribution over all orders of `players`, one payoff at a time."""
    players = range(game.n_players) if players is None else players
    phi, n_orders = dict.fromkeys(players, 0.0), 0
    payoff = {}

    def v(members):
        if members not in payoff:
            row = np.full((1, game.n_players), others_present)
            row[0, list(players)] = False
            row[0, list(members)] = True
            payoff[members] = float(game(row)[0])
        return payoff[members]

    for order in permutations(players):
        n_orders += 1
        here = frozenset()
        for player in order:
            phi[player] += v(here | {player}) - v(here)
            here |= {player}
    return np.array([phi[player] / n_orders for player in players])
