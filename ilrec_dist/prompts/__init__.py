"""Prompts: templates as data, rendered to tokens with the response marked."""
