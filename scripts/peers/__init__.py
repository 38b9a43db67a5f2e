"""Optimizers of other packages, each timed against SGD in a process of its own."""
