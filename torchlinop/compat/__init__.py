"""The names of other packages on these operators."""
