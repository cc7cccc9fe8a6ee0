"""Entry point MONAI Label looks for: ``monailabel.main start_server --app apps/mshub --studies DIR``."""

import importlib.util
import sys

if importlib.util.find_spec("mshub") is None:
    sys.exit(
        "MSHub's library is not installed in this Python: run `make serve` in the MSHub checkout, "
        "or `pip install -e .` there."
    )

from lib.app import MSHubApp

__all__ = ["MSHubApp"]
