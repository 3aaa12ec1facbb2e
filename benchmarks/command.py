"""The command line of a benchmark."""

import argparse


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """That of `python -m benchmarks.NAME`, whose help is the description as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
