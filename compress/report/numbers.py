"""Numbers as people read them; the only place where units are scaled."""

from compress.metrics import METRICS
from compress.results.report import Report
from compress.results.sides import Comparison, Measurement, Verdict

WORDS: dict[Verdict, str] = {"pass": "pass", "fail": "FAIL", "cannot_tell": "cannot tell yet"}


def verdict_words(verdict: Verdict) -> str:
    return WORDS[verdict]


def figure(measurement: Measurement | None) -> str:
    """14.7 MB, 21.3 ms, 71.52, with the number of examples that it lacks; why there is none where there is none."""
    if measurement is None:
        return "-"
    if measurement.value is None:
        return measurement.reason or "-"
    text = scaled(measurement.value, METRICS[measurement.metric].unit)
    return f"{text}, {measurement.missing:,} missing" if measurement.missing else text


def scaled(value: float, unit: str) -> str:
    """A value with its unit, scaled for reading: bytes to kB, MB, GB (powers of ten), seconds to ms."""
    if unit == "bytes":
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if abs(value) >= size:
                return f"{value / size:.2f} {name}"
        return f"{value:.0f} B"
    if unit == "s":
        return f"{value * 1000:.1f} ms" if abs(value) < 1 else f"{value:.2f} s"
    if unit == "1":
        return f"{value:,.0f}" if value == int(value) else f"{value:.3f}"
    if unit == "nats":
        return f"{value:.4g} nats"
    return f"{value:.2f}" if unit == "points" else f"{value:,.1f} {unit}"


def count(value: int) -> str:
    """A number of weights in short: 512, 65.5 k, 7.62 M, 8.03 G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # what would be rounded to a thousand of the letter below
            return f"{value / size:.3g} {letter}"
    return str(value)


def duration(seconds: float) -> str:
    """A rough length of time: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def share(value: float | None) -> str:
    """A share as a percentage: 0.226 %, 5.3 %."""
    if value is None:
        return "-"
    return f"{100 * value:,.0f} %" if value >= 10 else f"{100 * value:.3g} %"


def percent(report: Report) -> str:
    """What a report's intervals hold the truth in: 95 % of cases."""
    return f"{100 * report.confidence:g} %"


def change(compared: Comparison | None, interval: bool = True) -> str:
    """-0.21 (-0.60 to +0.15) for a difference, x0.32 or x1.05 (0.98 to 1.12) for a ratio; without the interval where it isn't wanted."""
    if compared is None or compared.estimate is None:
        return "-"
    estimate, low, high = compared.estimate, compared.low, compared.high
    if not interval:
        low = high = None
    if compared.kind == "difference":
        digits = {"1": ".3f", "nats": ".4f"}.get(METRICS[compared.metric].unit, ".2f")
        text = f"{estimate:+{digits}}"
        return text if low is None or high is None else f"{text} ({low:+{digits}} to {high:+{digits}})"
    text = f"x{estimate:.3f}"
    return text if low is None or high is None or low == high else f"{text} ({low:.3f} to {high:.3f})"
