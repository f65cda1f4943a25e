"""Text of anybody's making where people read it."""


def printable(text: str) -> str:
    """Text with escapes for what would move a cursor, colour a screen or begin a line."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
