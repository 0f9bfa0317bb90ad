"""Meshwright: plan how to spread the training of a transformer, train it that way, explain where the time went."""

__version__ = "0.1.0"
