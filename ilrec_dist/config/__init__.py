"""The configuration tree and how it is loaded."""
