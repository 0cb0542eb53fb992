"""Weights on disk: what is stored, under which names, and how it becomes ours."""
