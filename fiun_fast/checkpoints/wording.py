"""Words of people and sizes of files, as they are printed."""

from __future__ import annotations

LONGEST = 200  # characters of a name


def shown(text: object, most: int = LONGEST) -> str:
    """A text that others wrote, safe on a terminal: what does not print is escaped, and what is long is cut."""
    found = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return found if len(found) <= most else f"{found[:most]}…"


def human_size(count: float) -> str:
    """Bytes as people read them: "13.5 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.95:
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def counted(count: int, what: str) -> str:
    """A number and its noun: "1 model", "2 models"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
