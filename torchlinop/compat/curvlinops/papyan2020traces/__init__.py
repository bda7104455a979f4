"""Spectral densities, where curvlinops has them."""
