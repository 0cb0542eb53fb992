"""Checks of what is refused: by name, in one short line, and not accepted in silence."""

from __future__ import annotations

from collections.abc import Iterator

from lamina.conformance.report import RAISED, Row, judged
from lamina.conformance.subject import Subject

WRONG = "atention_mask"
LONGEST_MESSAGE = 400  # characters


def refusals(subject: Subject) -> Iterator[Row]:
    longest, said = 0, "none"
    for what, attempt in subject.wrong(WRONG).items():
        article = "an" if what[0] in "aeiou" else "a"
        name = f"{article} {what} that does not exist is refused by name"
        try:
            attempt()
        except RAISED as error:
            message = str(error)
            longest, said = max((longest, said), (len(message), what))
            named = WRONG in message
            yield Row(name, WRONG, None, None, "holds" if named else "fails", " ".join(message.split())[:200])
        else:
            strangers = subject.strangers() if "configuration" in what else []
            note = f"; so are those of this model: {', '.join(strangers)}" if strangers else ""
            yield Row(name, WRONG, None, None, "fails", f"it was accepted{note}")
    for what, attempt in subject.asks().items():
        try:
            attempt()
        except RAISED as error:
            longest, said = max((longest, said), (len(str(error)), what))
    name = f"a refusal is at most {LONGEST_MESSAGE} characters"
    yield judged(name, f"the longest: {said}", float(longest), float(LONGEST_MESSAGE))
