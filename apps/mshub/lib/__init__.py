"""The MONAI Label app: the only code that knows MONAI Label."""
