"""The names of labels: they are handed on with a prompt, and terminals show them."""

import unicodedata

MOST_LABEL_CHARACTERS = 100
_JOINERS = "\u200c\u200d"
"""Zero-width non-joiner and joiner. Persian and Indian words need them, and composed emoji."""


def label_fault(label: str) -> str | None:
    """Say why a label cannot be handed on with a prompt, without quoting it; None if it can."""
    if len(label) > MOST_LABEL_CHARACTERS:
        return f"has more than {MOST_LABEL_CHARACTERS} characters"
    for place, character in enumerate(label):
        if not character.isprintable() and not _joins(label, place):
            name = unicodedata.name(character, "a control character")
            code = f"U+{ord(character):04X}"
            return f"has a character that does not print: {name} ({code}) at position {place + 1}"
    return None


def _joins(label: str, place: int) -> bool:
    """Return whether a character is a joiner between two characters that it can join."""
    beside = label[max(place - 1, 0) : place] + label[place + 1 : place + 2]
    if label[place] not in _JOINERS or len(beside) < 2:
        return False
    # Between letters of ASCII, a joiner would only make two labels look alike.
    return beside.isprintable() and not any(map(str.isascii, beside))
