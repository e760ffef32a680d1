"""Look at a model: where its parameters are, how many are near zero, where the time of a forward pass goes.

Exit status: 0 looked at, 2 bad input, 3 the work failed.

Example:  compress inspect ./my-model --picture my-model.png
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from compress.verbs._answer import print_json
from compress.verbs._arguments import on_a_device


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder, a hub id, or builtin")
    parser.add_argument(
        "--task", metavar="TASK", help="seq2seq, causal-lm or sequence-classification; by default read from the model's config"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="inputs in the forward pass that is timed (1)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens in each, on both sides of an encoder-decoder (128, or all that fit)"
    )
    parser.add_argument("--all", action="store_true", help="a row for every layer, not one for layers that differ in numbers only")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it as well, into a .png or .svg (needs matplotlib)")
    on_a_device(parser)


def call(options: Namespace) -> int:
    from compress import pipeline, terminal

    if options.picture:
        from compress.inspection import picture

        picture.refuse(options.picture)
    with terminal.bars() as progress:
        inspection = pipeline.inspect(options.model, options.task, options.device, options.batch_size, options.tokens, progress)
    if options.picture:
        picture.draw(inspection, options.picture)
    if options.json:
        print_json(inspection.as_json())
    else:
        terminal.show_inspection(inspection, options.all)
    return 0
