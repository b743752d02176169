"""Readers of foreign formats: each turns one format into a Source, a stream of Arrow batches and an item table."""
