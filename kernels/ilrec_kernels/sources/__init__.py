"""Four ways to make a chunk's logits, to reduce them and to turn them into
gradients.
"""
