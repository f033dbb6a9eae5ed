"""What PEFT puts adapters on by itself: for a family with NSA the same modules as for the family.

PEFT keeps a table a method of tuning, from model types to names of modules, and has no way to add to them but this.
"""

import sys
from typing import Any

PREFIX = "nsa_"


def tell_peft(model_type: str) -> None:
    """Enter a model type "nsa_FAMILY" wherever PEFT, if it is loaded, has FAMILY and not yet this type."""
    tables: Any = sys.modules.get("peft.utils.constants")
    for name, table in vars(tables).items() if tables is not None else ():
        if name.endswith("_MODULES_MAPPING") and (targets := table.get(model_type.removeprefix(PREFIX))) is not None:
            table.setdefault(model_type, targets)
