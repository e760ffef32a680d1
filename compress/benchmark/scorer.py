"""The scoring process: compares texts with references, in the same way for every engine.

What it imports doesn't count as a model's memory, and an engine's own environment may lack it.
"""

from compress import scores
from compress.benchmark.messages import Score
from compress.border import answering
from compress.process import Progress, serve
from compress.scores import Samples
from compress.scripts import Tokenizers


def score(progress: Progress, request: Score) -> Samples:
    """Statistics of the metrics on texts."""
    return scores.score_texts(request.groups, request.texts, request.references, Tokenizers(**request.tokenizers))


if __name__ == "__main__":
    serve(answering({Score: score}))
