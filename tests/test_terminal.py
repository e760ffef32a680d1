"""What a terminal shows of a report."""

from compress import terminal
from tests.report.test_files import made


def test_a_point_that_no_side_was_measured_at_is_one_line_with_its_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    terminal.show_report(made())
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "batch 8, prompt 64: not measured: out of memory" in shown
    assert [line.split()[0] for line in shown if line.startswith("latency_p50")] == ["latency_p50"], "of the point that was measured"
    assert sum("batch 1, prompt 64" in line for line in shown) == 1
