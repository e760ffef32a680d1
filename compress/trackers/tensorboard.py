"""TensorBoard: event files in the report's own folder, a run a side, so that `tensorboard --logdir reports` shows them all."""

import time

from compress.results.report import Report
from compress.trackers import _facts


def log(report: Report) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    now = time.time()
    for side in report.sides:
        summaries = [(0, scalar_pb(name, value)) for name, value in _facts.figures(side).items()]
        if side.role == "candidate":
            summaries += [
                (0, hparams_pb(_facts.params(report))),
                (0, text_pb("report", (report.folder / "report.md").read_text(encoding="utf-8"))),
            ]
            summaries += [(0, text_pb(name, text)) for name, text in _facts.tags(report).items()]
            for stage, step, taken in _facts.curves(report):
                summaries += [(step, scalar_pb(f"{stage}/{name}", value)) for name, value in taken.items()]
        writer = EventFileWriter(str(report.folder / "tensorboard" / side.role))
        try:
            for step, summary in summaries:
                writer.add_event(Event(wall_time=now, step=step, summary=summary))
        finally:
            writer.close()
