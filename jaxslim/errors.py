"""What all errors of this library are: a ValueError with a message for people."""
from __future__ import annotations

MOST = 1200   # characters


class ClearError(ValueError):
    """An error that its message explains. Names and values from a file stand in it, and these can be of any length:
    a long message is shown without its middle."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= MOST else f"{text[: MOST * 2 // 3]} [...] {text[-MOST // 4 :]}"
