"""Tasks of EleutherAI's lm-evaluation-harness on a loaded model: each example's score becomes a sample like any other metric's."""

import difflib
import logging
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import DataError
from compress.metrics import TASK
from compress.scores import Samples, finite

ROWS = 8  # of a batch; lm_eval counts rows, and the longest come first there too


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str | dict[str, Any], limit: int | None
) -> tuple[Samples, list[str]]:
    """Scores in points, an example a row, under lm_eval:task:metric, and remarks. A group's examples follow each other.

    task    a task or group of tasks by name, or a task's settings as in its YAML file
    limit   how many examples of each task, the first ones; None takes all

    Metrics that are no means over examples, or better when lower, are left out and named.

    Raises DataError for an unknown task, and where its data can't be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    if isinstance(task, str) and task not in manager.all_tasks:
        near = difflib.get_close_matches(task, manager.all_tasks, n=3)
        raise DataError(f"metrics: lm_eval has no task {task!r}" + (f"; near it are {', '.join(near)}" if near else ""))
    name = task if isinstance(task, str) else str(task["task"])
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    try:
        evaluation = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=ROWS), tasks=[task], task_manager=manager,
            limit=limit, bootstrap_iters=0, log_samples=True, verbosity="ERROR",
        )  # fmt: skip
    except (OSError, ConnectionError) as error:  # its data lie on the hub
        raise DataError(f"metrics: the data of lm_eval's task {name!r} can't be had: {str(error).splitlines()[0]}") from None
    samples: Samples = {}
    left_out = set()
    for part, rows in sorted(evaluation["samples"].items()):
        better = evaluation["higher_is_better"][part]
        for row in rows:
            for metric in row["metrics"]:
                label = metric if row["filter"] == "none" else f"{metric},{row['filter']}"
                if better.get(metric) and isinstance(row[metric], bool | int | float):
                    samples.setdefault(f"{TASK}{name}:{label}", []).append(finite(100.0 * row[metric]))
                else:
                    left_out.add(label)
    if not samples:
        raise DataError(
            f"metrics: lm_eval's task {name!r} has no metric that is a mean over examples; it has {', '.join(sorted(left_out))}"
        )
    remark = f"of lm_eval's task {name} were left out, being no means over examples or better lower: {', '.join(sorted(left_out))}"
    return samples, [remark] if left_out else []
