"""A scenario of the evidence that is small enough for tests."""

from __future__ import annotations

from typing import Any

from finetune_data import NETWORK_2D

TOY: dict[str, Any] = {
    "title": "Boxes",
    "folder": "toy",
    "source": {
        "data": {
            "classes": ["background", "thing"],
            "label_map": {0: "background", "1-2": "thing"},
        },
        "subjects": 2,
        "steps": 2,
        "lr": 0.01,
    },
    "target": {"data": {"classes": ["background", "box", "crate"]}, "train": 2, "test": 2},
    "network": NETWORK_2D,
    "train": {"batch_size": 2, "patch_size": 16},
    "lengths": {"short": 2},
    "curve": 2,
    "seeds": 2,
    "tuning": {"rates": [0.01, 0.02], "seeds": 1},
}
