"""Published architectures, built from their configuration, against plain PyTorch."""
