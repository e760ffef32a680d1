"""report.html: one page that needs nothing but itself, for one run or for several candidates.

Everything is shown as text, whatever it holds: the template escapes, and the script writes text nodes only. A content security policy
allows the page's own two scripts, by their digests, and no request at all. The numbers, the examples and the charts' data lie in the
page as compressed JSON, from which the script draws and which can be saved.
"""

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.errors import NoSpace, printable
from compress.files import write_whole
from compress.report.html import charts, examples, sections
from compress.results.report import Report

ROOM = 1_800_000  # bytes for the data; the drawing library takes 0.9 MB, and a page is to stay under 3 MB
# examples, and whether with samples: the first that fits
CUTS = ((1000, True), (500, True), (200, True), (200, False), (50, False), (0, False))
SAMPLES = {"sides": {"__all__": {"measurements": {"__all__": {"samples", "raw"}}}}}


def render(reports: Sequence[Report]) -> str:
    """The page of one report, or of several candidates held against the same baseline, in order.

    Baselines that differ are all shown; each change is against the baseline of the candidate's own run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    columns = sections.columns(reports)
    drawn = charts.of(columns)
    packed, shown, cut = _packed(reports, drawn)
    scripts = [_drawing_library(), _file("page.js")]
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, finalize=_as_text,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return page.get_template("page.html").render(
        sections.of(columns), charts=drawn, examples=shown, cut=cut, data=packed, css=Markup(_file("page.css")),  # noqa: S704 our own file
        scripts=[Markup(script) for script in scripts],  # noqa: S704 our own, and the library's
        allowed=" ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts),
    )  # fmt: skip


def _packed(reports: Sequence[Report], drawn: dict[str, Any]) -> tuple[str, int, str]:
    """What the script reads, as gzipped JSON in base64; how many examples that holds; what was left out for want of room, if anything."""
    score, all_examples = examples.merged(reports)
    most = examples.ranked(all_examples, score)[: CUTS[0][0]]
    texts = {place: examples.compared(all_examples[place]) for place in most}
    for number, samples in CUTS:
        kept = [texts[place] for place in sorted(most[:number])]
        numbers = [report.model_dump(mode="json", exclude={"predictions": True, **({} if samples else SAMPLES)}) for report in reports]
        data = {"charts": drawn, "score": score, "examples": kept, "reports": numbers}
        packed = base64.b64encode(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), 6, mtime=0)).decode()
        if len(packed) <= ROOM:
            break
    dropped = len(all_examples) - len(kept)
    left_out = [f"{dropped:,} of {len(all_examples):,} examples, those that changed least"] if dropped else []
    left_out += [] if samples else ["the samples of every figure"]
    return packed, len(kept), " and ".join(left_out)


@cache
def _drawing_library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, which takes seconds to make; a person's cache keeps it."""
    import vl_convert

    place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compress" / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError):
        return place.read_text(encoding="utf-8")
    script = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")
    with suppress(OSError, NoSpace):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, script)
    return script


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _as_text(value: Any) -> Any:
    """What the template shows of a value: nothing that a browser would act upon, a dash for what is missing."""
    if value is None:
        return "–"
    return value if hasattr(value, "__html__") else printable(str(value)).encode("utf-8", "replace").decode()
