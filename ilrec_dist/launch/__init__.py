"""Starts worker processes, by Ray Train or torchrun, and joins a Ray cluster."""
