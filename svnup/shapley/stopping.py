"""Stopping rules of estimators that converge."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from svnup.types import Floats


def check_stop(stop: dict[str, float] | None) -> None:
    """Raise ValueError unless the rule is None, {stderr: x} with x > 0, or {rank_tau: x} with 0 < x <= 1."""
    if stop is None:
        return
    text = f"stop={stop}: choose {{stderr: 0.01}} (the largest standard error) or {{rank_tau: 0.95}} (Kendall's tau)"
    if len(stop) != 1 or next(iter(stop)) not in ("stderr", "rank_tau"):
        raise ValueError(text)
    value = next(iter(stop.values()))
    if not isinstance(value, int | float) or not value > 0 or ("rank_tau" in stop and value > 1):
        raise ValueError(text)


@dataclass
class Stopping:
    """Decides after each round of samples whether to stop.

    Args:
        stop: {stderr: x} stops when the largest standard error is at most x; {rank_tau: x} when Kendall's tau between the
            rankings of this round and of each of the two before is at least x; None never.
        reason: why the estimator stopped.
    """

    stop: dict[str, float] | None
    reason: str = "budget spent"
    _rounds: list[Floats] = field(default_factory=list)

    def enough(self, values: Floats, stderr: Floats) -> bool:
        """Whether to stop after a round with these values and standard errors, both (n_players,)."""
        self._rounds.append(values)
        if self.stop is None:
            return False
        if "stderr" in self.stop and stderr.max() <= self.stop["stderr"]:
            self.reason = f"largest standard error {stderr.max():.3g} <= {self.stop['stderr']:g}"
            return True
        if "rank_tau" in self.stop and len(self._rounds) > 2:
            tau = min(kendall_tau(values, earlier) for earlier in self._rounds[-3:-1])
            if tau >= self.stop["rank_tau"]:
                self.reason = f"Kendall's tau {tau:.3g} to the two rounds before >= {self.stop['rank_tau']:g}"
                return True
        return False


def kendall_tau(x: Floats, y: Floats) -> float:
    """Kendall's tau-b of two vectors (n,); 0 where one of them is constant."""
    upper = np.triu_indices(len(x), 1)
    a, b = (np.sign(v[:, None] - v)[upper] for v in (np.asarray(x), np.asarray(y)))
    norm = np.sqrt((a != 0).sum() * (b != 0).sum())
    return float((a * b).sum() / norm) if norm else 0.0
