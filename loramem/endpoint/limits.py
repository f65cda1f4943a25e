"""What the endpoint takes on, so that no client can keep it from the others."""

from dataclasses import dataclass, fields

from loramem.errors import ArgumentError


@dataclass(frozen=True)
class Limits:
    """Bounds of one endpoint, all above zero."""

    body_bytes: int = 256 * 1024
    """Of a request's body: a longer one is refused unread."""
    body_s: float = 10.0
    """Seconds that a client has to send its body."""
    queue: int = 512
    """Requests that may wait or be answered at once; more are turned away at once."""
    answer_s: float = 60.0
    """Seconds from a request to its answer, waiting included."""
    batch_records: int = 64
    """Most questions that are decoded together."""
    base_tokens: int = 512
    """Most tokens that the base model answers with, where it is asked at all."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (value := vars(self)[field.name]) > 0:
                raise ArgumentError(f"{field.name} must be above 0, not {value}", argument=field.name, value=value)
