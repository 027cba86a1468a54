"""Numbers of things, for messages and tables."""


def counted(number: int, noun: str) -> str:
    """1, 'image' -> '1 image'; 1257, 'image' -> '1,257 images'; 0, 'class' -> '0 classes'."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """'image' -> 'images'; 'batch' -> 'batches'."""
    return noun + ("es" if noun.endswith(("s", "ch")) else "s")
