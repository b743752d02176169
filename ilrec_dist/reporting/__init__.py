"""Live metrics, results and the report of a run."""
