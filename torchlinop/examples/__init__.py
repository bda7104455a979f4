"""Examples that are installed with the package: ``python -m torchlinop demo``."""
