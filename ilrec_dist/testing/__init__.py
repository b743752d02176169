"""Helpers for tests of distributed code."""
