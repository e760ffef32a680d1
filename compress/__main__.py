"""`python -m compress` is the command line program."""

from compress.cli import main

main()
