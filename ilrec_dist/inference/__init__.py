"""Ranking with a trained backbone: beam search over the trie, batches of histories, new
users.
"""
