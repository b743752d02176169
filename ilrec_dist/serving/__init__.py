"""Answers requests for recommendations over HTTP."""
