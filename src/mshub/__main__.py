"""``python -m mshub`` is ``mshub``."""

from mshub.cli import main

if __name__ == "__main__":
    main()
