"""A verdict for a pipeline: JUnit XML, and annotations for GitHub's runners."""

from collections import Counter
from collections.abc import Sequence
from xml.etree import ElementTree as xml

from compress.errors import printable
from compress.report.numbers import verdict_words
from compress.results.report import Report
from compress.results.sides import Verdict

Finding = tuple[str, Verdict, str]  # name, verdict, sentence


def junit(reports: Sequence[Report]) -> str:
    """JUnit's XML: a suite a report, a test case a gate, a failure where it fails, an error where the data cannot tell."""
    root = xml.Element("testsuites", {"name": "compress", **_counts([row for report in reports for row in _findings(report)])})
    for report in reports:
        rows = _findings(report)
        suite = xml.SubElement(root, "testsuite", {"name": printable(report.recipe), **_counts(rows), "timestamp": report.created})
        for name, verdict, sentence in rows:
            case = xml.SubElement(suite, "testcase", classname=printable(report.recipe), name=printable(name))
            if verdict != "pass":
                message = printable(sentence)
                problem = xml.SubElement(case, "failure" if verdict == "fail" else "error", type=verdict_words(verdict), message=message)
                problem.text = f"{message}\n{printable(str(report.folder))}"
    xml.indent(root)
    return xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(rows: Sequence[Finding]) -> dict[str, str]:
    verdicts = Counter(verdict for _, verdict, _ in rows)
    return {"tests": str(len(rows)), "failures": str(verdicts["fail"]), "errors": str(verdicts["cannot_tell"])}


def annotations(report: Report) -> list[str]:
    """Workflow commands that make GitHub show what doesn't pass, failures first: the recipe in the title, the interval in the message."""
    commands = []
    for name, verdict, sentence in sorted(_findings(report), key=lambda row: row[1] != "fail"):
        title = _escaped(f"{report.recipe}: {verdict_words(verdict)}: {name}").replace(":", "%3A").replace(",", "%2C")
        if verdict != "pass":
            commands.append(f"::{'error' if verdict == 'fail' else 'warning'} title={title}::{_escaped(sentence)}")
    return commands


def _findings(report: Report) -> list[Finding]:
    """Name, verdict and sentence of every gate, and of the whole report where no gate has its verdict."""
    findings: list[Finding] = [(gate.label, gate.verdict, gate.sentence) for gate in report.gates]
    if report.verdict not in {verdict for _, verdict, _ in findings}:
        findings.append(("verdict", report.verdict, report.decided_by))
    return findings


def _escaped(text: str) -> str:
    """Text that can't end its command (GitHub's workflow commands, toolkit's escapeData)."""
    return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
