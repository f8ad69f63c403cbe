"""The demo with a searched plan beside FALCON's ranks everywhere, at as many mult-adds as one.

Command: python train.py --config=configs/demo_searched.py --workdir=runs/demo_searched
Others: configs/demo_searched.py:10290570 for as many as rank 2 has, any share or number
Machine: two CPU cores
Run time: 20 minutes beside other work
Expected score: 98.05% before fine-tuning, 98.33% after it (docs/results.md, Searched plans)
"""

from typing import Any

from ml_collections import ConfigDict

from configs import demo

AS_RANK_1 = "5358986"


def get_config(mult_adds: str = AS_RANK_1) -> ConfigDict:
    """Return the demo's config with a target for one more variant.

    Args:
        mult_adds: of the searched plan; below 1 a share of the standard model's.
    """
    config: Any = demo.get_config()
    number = float(mult_adds)
    config.compression.target = {"mult_adds": number if number < 1 else int(number)}
    return config
