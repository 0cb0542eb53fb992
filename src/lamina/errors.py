"""What lamina raises when a user's input is wrong: one line that names the file or field, the value and the remedy."""


class LaminaError(ValueError):
    """Bad input. The command line prints it as `lamina: error: ...` and exits with status 2."""


class CheckpointError(LaminaError):
    """A checkpoint, tokenizer or configuration file is damaged, lies about itself, or does not fit."""


class UnsupportedError(LaminaError):
    """A request is well formed, but the part asked (a backend, a cache, a family) cannot serve it."""


class StorageError(CheckpointError):
    """The disk could not take what was asked of it: full, or read-only. The command line exits with status 1."""


class TrainingError(LaminaError):
    """A run that was asked for rightly cannot go on: its numbers, or its memory. The command line exits with 1."""
