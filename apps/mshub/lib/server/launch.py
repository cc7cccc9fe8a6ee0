"""``python -m lib.server.launch start_server ...``: MONAI Label's own main, without its settings on the screen.

MONAI Label logs every option at INFO before it reads its logging configuration, and the addresses `mshub serve` printed
scroll away. It configures logging only where nobody has: this does.
"""

from __future__ import annotations

import logging

from monailabel.main import Main


def main() -> None:
    """Run MONAI Label's command line."""
    logging.basicConfig(level=logging.WARNING)
    Main().run()


if __name__ == "__main__":
    main()
