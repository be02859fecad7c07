"""Numbers and durations as people read them; "-" is what is not known."""

import math

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float, digits: int = 4) -> str:
    """So many digits that count: 2.314, 0.0002, 12,300."""
    if not math.isfinite(value):
        return "-"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10**digits else f"{rounded:,.{digits}g}"


def percent(value: float) -> str:
    """Of a share: 51.9%."""
    return f"{value:.1%}" if math.isfinite(value) else "-"


def tokens(value: float) -> str:
    """A count: 850, 12.3k, 4.56M."""
    if not math.isfinite(value):
        return "-"
    for size, unit in _UNITS:
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """45.2 s, 12 min 30 s, 3 h 05 min, 2 d 04 h."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
