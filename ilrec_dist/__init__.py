"""ILRec-dist trains a language model as a recommender.

Its self-hard negatives come from the model's own intermediate layers.
"""

__version__ = "0.1.0"
