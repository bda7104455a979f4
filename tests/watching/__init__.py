"""Runs that are watched, verified, priced, summed up and drawn."""
