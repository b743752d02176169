"""ILRec-dist: train a language model as a recommender with self-hard negatives from its own intermediate layers."""

__version__ = "0.1.0"
