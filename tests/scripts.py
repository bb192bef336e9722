"""Scripts of the repository that no package holds, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def script(path: str) -> ModuleType:
    """The script at a path from the root of the repository."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", Path(__file__).parent.parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
