"""The stages of a run: what they stand on, when they run again, and where they run."""
