"""Numbers in sentences."""


def counted(count: int, noun: str) -> str:
    """`1, "episode"` → "1 episode"; otherwise "2 episodes"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
