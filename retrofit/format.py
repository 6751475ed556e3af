"""Numbers as people read them: counts, bytes, durations, ratios, lengths. The one place that writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits and thousands separators: 1.52, 43.5, 17,521, 2.1e-06."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size != 0 and size < 1e-3:
        return f"{value:.{digits - 1}e}"
    whole = math.floor(math.log10(size)) + 1 if size else digits
    return f"{value:,.{max(digits - whole, 0)}f}"


def plain(value: float | None) -> str:
    """A number as it stands in a sentence, without trailing zeros: 2, 1.5, 0.001."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def times(value: float | None) -> str:
    """A ratio: 3×, 1.5×, 1.71×."""
    return NONE if value is None else f"{plain(value)}×"


def count(value: float | None) -> str:
    """A count with thousands separators; below 100 with one decimal if it has a fraction."""
    if value is None:
        return NONE
    return f"{value:,.1f}" if value < 100 and value != int(value) else f"{value:,.0f}"


def amount(value: float, unit: str) -> str:
    """A count with its unit; bytes in binary units."""
    return nbytes(value) if unit == "B" else f"{count(value)} {unit}".rstrip()


def enumerated(parts: Sequence[str]) -> str:
    """At least one thing in a sentence: "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def heads(count: int) -> str:
    """ "1 KV head", "2 KV heads"."""
    return f"{count} KV head{'' if count == 1 else 's'}"


def nbytes_at_least(value: int) -> str:
    """Bytes as a budget is written, rounded up, so that it holds them: 32.2KiB for 32,900."""
    power = min((value.bit_length() - 1) // 10, len(_UNITS) - 1) if value else 0
    scaled = value / 1024**power
    digits = 0 if power == 0 else max(3 - len(str(int(scaled))), 0)
    return f"{math.ceil(scaled * 10**digits) / 10**digits:.{digits}f}{_UNITS[power]}"


def nbytes(value: float | None) -> str:
    """Bytes: 22.5 KiB, 1.41 GiB."""
    if value is None:
        return NONE
    power = 0
    while abs(value) >= 1024 and power < len(_UNITS) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.0f} {_UNITS[power]}" if power == 0 else f"{number(value)} {_UNITS[power]}"


def kv_per_token(first: float, beyond: float) -> str:
    """Bytes that a token adds to a KV cache: 22.5 KiB; where layers have windows, also what it adds beyond them."""
    return nbytes(first) if first == beyond else f"{nbytes(first)} ({nbytes(beyond)} once sliding windows are full)"


def duration(seconds: float | None) -> str:
    """0.4 s, 12 s, 3 min 20 s, 1 h 5 min."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def tokens(value: int) -> str:
    """Axis label of a length: 512, 8k, 128k (powers of two in units of 1024)."""
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else f"{value:,}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A value with its interval in brackets."""
    if value is None or low is None or high is None:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


UNSEEN = "unseen"


def read_in(seen: Mapping[str, Sequence[str]], kind: str) -> str:
    """What text of a kind was read for: "calibration, training", or "unseen"; of kinds together, which `seen` does not
    name, a dash."""
    return NONE if kind not in seen else ", ".join(seen[kind]) or UNSEEN


def kind(name: str, seen: Mapping[str, Sequence[str]], known_as: str = "") -> str:
    """A kind of text with its mark: "book.txt (unseen)", "python-docs (read in calibration, training)". known_as: what
    a reader calls it."""
    mark, shown = read_in(seen, name), known_as or name
    return shown if mark == NONE else f"{shown} ({mark if mark == UNSEEN else f'read in {mark}'})"


def none_unseen(seen: Mapping[str, Sequence[str]]) -> str:
    """A sentence that no measured kind of text is unseen; empty where one is, and where no step read any text."""
    if not seen or not all(seen.values()):
        return ""
    steps = " and ".join(dict.fromkeys(purpose for purposes in seen.values() for purpose in purposes))
    return (
        f"No kind of text that was measured is unseen: {steps} read other documents of each, so what is lost on other "
        "kinds of text is not shown."
    )


def ranks(first: int, last: int | None) -> str:
    """A band of ranks: 1-10, 101-1,000, above 1,000; all from 1 on."""
    if last is None:
        return "all" if first == 1 else f"above {first - 1:,}"
    return f"{first:,}-{last:,}"


def same_losses(difference: float, tolerance: float, *, passed: bool) -> str:
    """How near a token's loss of a reloaded checkpoint is, beside the tolerance."""
    what = "same losses" if passed else "OTHER LOSSES"
    return f"{what} (a token's differs by at most {number(difference)} nats, tolerance {plain(tolerance)})"
