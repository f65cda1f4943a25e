"""Arguments that take one of a few strings, held against them where they come in."""

from collections.abc import Sequence

from loramem.errors import UnknownChoice


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices of an argument; of a `Literal` they are its ``get_args``.

    Raises:
        UnknownChoice: It is none of them.
    """
    if value not in choices:
        raise UnknownChoice(name, value, choices)
