"""Costs of the networks and accuracies of the recipes: `zoo.json`, which `python -m benchmarks.zoo` writes.

To count them takes seconds, and the measured runs are not part of this package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ZOO = Path(__file__).with_name("zoo.json")


def read_zoo() -> dict[str, Any]:
    """Read `networks` and `recipes`, each by name.

    A network has `parameters`, and `macs` (multiply-adds) for one image, with shortcut B and ten classes. A recipe has
    the accuracy of its default network on CIFAR-10 for each seed: in percent, last epoch, single view.
    """
    return json.loads(ZOO.read_text(encoding="utf-8"))
