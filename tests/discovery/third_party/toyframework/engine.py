"""The module whose function an adapter replaces."""


def load(name: str) -> str:
    return f"stock {name}"
