"""The base model that ships with loramem, and the recipe that made it."""

from pathlib import Path

NAME = "loramem-tiny"


def base_path() -> Path:
    """Folder of the embedded base model, in the layout transformers loads."""
    return Path(__file__).parent / NAME
