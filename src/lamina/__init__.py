"""Transformers in which every layer is one part, reading real checkpoints exactly."""
