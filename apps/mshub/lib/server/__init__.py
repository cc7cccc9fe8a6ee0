"""The HTTP layer around MONAI Label's own FastAPI app."""
