"""MSHub: nnU-Net models as MONAI Label tasks, with a loop that makes them better."""

__version__ = "0.1.0"
