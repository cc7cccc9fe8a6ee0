"""With this folder on PYTHONPATH, ``python -m mshub.worker`` runs the worker beside this file: see `worker.py`."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path


class _FakeWorker:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(name, Path(__file__).with_name("worker.py")) if name == "mshub.worker" else None


sys.meta_path.insert(0, _FakeWorker)
