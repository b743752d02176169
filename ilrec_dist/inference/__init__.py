"""Constrained beam search over the catalogue's trie."""
