"""Numbers as people read them: three figures and a prefix."""

from __future__ import annotations

DECIMAL = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BINARY = ((2**50, "PiB"), (2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def short(number: float, unit: str = "") -> str:
    """A number in three figures, with its unit if any: 1234567 -> "1.23 M", or "1.23 Mtokens"; 7 -> "7 tokens"."""
    for power, prefix in DECIMAL:
        if number >= power * 0.9995:
            return f"{number / power:#.3g} {prefix}{unit}".replace(". ", " ")
    return f"{number:.0f} {unit}".rstrip()


def size(number: float) -> str:
    """Bytes: 67645734912 -> "63.0 GiB"."""
    for power, unit in BINARY:
        if number >= power:
            return f"{number / power:.1f} {unit}"
    return f"{number:.0f} B"
