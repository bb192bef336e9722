"""Where lm-eval finds the items, whatever the working directory, and without asking a hub."""

import json
from pathlib import Path
from typing import Any


def load(**metadata: Any) -> dict[str, Any]:
    """The splits of the data set."""
    from datasets import Dataset

    with Path(__file__).with_suffix(".jsonl").open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}
