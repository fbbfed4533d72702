"""A row of a file of ``dpo bench``."""

from typing import Any


def row(scenario: str = "135m-chat", seconds: float = 2.0, **changes: Any) -> dict[str, Any]:
    return {
        "scenario": scenario,
        "device": "a CPU",
        "threads": 2,
        "torch": "2.13.0",
        "settings": {},
        "step_seconds": [seconds, seconds * 1.05, seconds * 1.1],
        "pairs_per_s": 4.0,
        "useful_tokens_per_s": 800.0,
        "useful_share": 1.0,
        "useful_flops": 1e12,
        "matrix_flops_per_s": 1e12,
        "mfu": 0.5,
        "datasheet_flops_per_s": None,
        "peak_mib": 3000.0,
        "state_mib": 2000.0,
        "reference_seconds": 0.5,
        "split": {"data": 0.0, "forward": 1.0, "backward": 2.0, "optimizer": 0.1},
        "notes": [],
        "wall_seconds": 30.0,
    } | changes
