"""Where a run's numbers go besides its folder: the tracker's protocol, and none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from svnup.results.row import ResultRow

Log = Callable[[ResultRow, dict[str, Path]], None]


class Figures(Protocol):
    """What draws the figures of a run: `svnup.reports.figures`, which the library does not know."""

    def names(self, row: ResultRow) -> list[str]:
        """The figures that a row has."""
        ...

    def figures(self, row: ResultRow, folder: Path) -> dict[str, Path]:
        """Draw them into a folder; returns their paths by name."""
        ...


class Tracker(Protocol):
    """Where a run is told beside its folder."""

    awaited: bool  # whether somebody waits for this job's numbers, be it finished already or not

    def check(self) -> None:
        """Raise ValueError where it cannot track."""
        ...

    def run(self, folder: Path, row: ResultRow, fresh: bool) -> AbstractContextManager[Log]:
        """The tracked run of a run folder; gives what logs its result, and ends with the state of the job."""
        ...


@dataclass(frozen=True)
class NoTracker:
    """Tracks nothing."""

    awaited = False

    def check(self) -> None: ...

    @contextmanager
    def run(self, folder: Path, row: ResultRow, fresh: bool) -> Iterator[Log]:
        yield lambda row, figures: None
