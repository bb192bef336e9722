"""svnup's sweeper (svnup/cli/sweep.py). Hydra looks for plugins in this namespace alone, so it lies beside svnup."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn


class Sweeper(BasicSweeper):
    """Hydra's own sweeper, which launches only what is left to do, and tells at the end what became of all jobs."""

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run all combinations of the arguments."""
        from svnup.cli.sweep import run  # other programs that use Hydra import this module too, and need no more of svnup

        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        given = [*(f"{key}={values}" for key, values in self.params.items()), *arguments]
        return run(given, self.config, self.launcher, self.hydra_context.config_loader, self.max_batch_size)
