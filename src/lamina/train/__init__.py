"""Training: a configuration, a loop, and what keeps a run safe and visible."""

from __future__ import annotations
