"""Token rewards from the collaborative-filtering model."""
