"""The command line as a module: `python -m heedful`."""

from heedful.train.cli import main

main()
