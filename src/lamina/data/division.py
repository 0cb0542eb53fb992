"""Which documents are kept for validation."""

from __future__ import annotations

import hashlib
from fractions import Fraction


def in_validation(document: int, part: float) -> bool:
    """Whether a document is for validation: of each 1 / part documents in a row, one that a hash draws.

    With part 0.1, one of documents 0 to 9, one of 10 to 19, ...: the part is exact, and what repeats in the data
    (ten classes in turn) does not always meet the same place.
    """
    share = Fraction(part).limit_denominator(1_000_000)
    if share == 0:
        return False
    group = int(document * share)
    first = _ceil(Fraction(group) / share)
    after = _ceil(Fraction(group + 1) / share)
    digest = hashlib.blake2b(f"lamina validation {group}".encode(), digest_size=8).digest()
    return document == first + int.from_bytes(digest, "little") % (after - first)


def _ceil(number: Fraction) -> int:
    return -((-number) // 1)
