"""Send an artifact to the Hugging Face hub: its own files with its card, and nothing else.

Refused where no report measured it, and where that report failed its gates. What is sent is shown first.

Exit status: 0 sent, 2 bad input, 3 the hub did not take it.

Example:  compress publish reports/artifacts/my-flan-t5-gptq-5d00a36b5fd3 my-name/my-flan-t5-gptq --private
"""

import sys
from argparse import ArgumentParser, Namespace

from compress.verbs._answer import print_json


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("place", metavar="ARTIFACT_OR_REPORT", help="an artifact's folder, or the folder of a report that measured one")
    parser.add_argument("repo", metavar="REPO_ID", help="the repository on the hub: owner/name, made where there is none")
    parser.add_argument("--private", action="store_true", help="into a private repository; a public one is refused")
    parser.add_argument("--revision", metavar="BRANCH", help="to this branch, made where there is none (main)")
    parser.add_argument("--failed-too", action="store_true", help="send it even if the report failed its gates; the card says so")


def call(options: Namespace) -> int:
    from compress import publish
    from compress.errors import printable
    from compress.report.numbers import scaled, verdict_words

    parcel = publish.pack(options.place, options.failed_too)
    for name, size in parcel.files.items():
        print(f"{scaled(size, 'bytes'):>10}  {printable(name)}", file=sys.stderr)
    total = f"{scaled(sum(parcel.files.values()), 'bytes'):>10}  in {len(parcel.files)} files of {parcel.artifact}"
    print(printable(f"{total}, measured by {parcel.report.folder} ({verdict_words(parcel.report.verdict)})"), file=sys.stderr)
    address = publish.publish(parcel, options.repo, options.private, options.revision)
    if options.json:
        print_json({"url": address, "files": parcel.files, "report": str(parcel.report.folder)})
    else:
        print(address)
    return 0
