"""Weights & Biases: a run a report, in the project and the mode that its own settings name (WANDB_PROJECT, WANDB_MODE)."""

import re

from compress.results.report import Report
from compress.trackers import _facts


def log(report: Report) -> None:
    import wandb

    files = wandb.Artifact(re.sub(r"[^\w.-]", "-", report.recipe), type="report")
    files.add_dir(str(report.folder))
    config = {**_facts.params(report), **_facts.tags(report)}  # its own tags are single words
    with wandb.init(name=_facts.title(report), config=config, tags=[report.verdict], notes=report.decided_by, reinit="create_new") as run:
        for stage, step, taken in _facts.curves(report):
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")  # each stage counts from one
            run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in taken.items()}})
        run.summary.update({f"{side.role}/{name}": value for side in report.sides for name, value in _facts.figures(side).items()})
        run.log_artifact(files)
