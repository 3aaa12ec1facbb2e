"""Commands that look at runs: list, plot and compare them."""

from pathlib import Path

from heedful.train.cli.arguments import PlotArguments
from heedful.train.cli.prepare import helps, parse, split_text
from heedful.train.cli.terminal import console
from heedful.train.errors import TrainError


def runs(arguments: list[str]) -> None:
    """heedful runs [DIR]: list the runs below DIR"""
    from heedful.train.inspection.runs import print_runs

    folder, rest = split_text(arguments)
    if rest:
        raise TrainError(f"heedful runs does not know {rest[0]}: give one folder, or none for runs")
    print_runs(Path(folder or "runs").expanduser(), console())


def plot(directory: str, arguments: list[str]) -> None:
    """heedful plot RUN: draw the curves of a run"""
    from heedful.train.inspection import curves
    from heedful.train.run import Run

    chosen = parse(PlotArguments(), arguments, f"heedful plot {directory}")
    curves.plot(Run.open(directory), console(), chosen.output)


def compare(directory: str, arguments: list[str]) -> None:
    """heedful compare RUN RUN [RUN ...]: show what differs in settings, numbers and curves"""
    from heedful.train.inspection.compare import compare

    directories = [directory]
    while (found := split_text(arguments))[0] is not None:
        directories.append(found[0])
        arguments = found[1]
    if len(directories) < 2 and not helps(arguments):
        raise TrainError(f"heedful compare needs two runs or more: heedful compare {directory} RUN")
    chosen = parse(PlotArguments(), arguments, "heedful compare RUN RUN")
    compare([Path(each).expanduser() for each in directories], console(), chosen.output)
