"""The command `report`: write one HTML file of a run, finished or not.

In: flags. Out: the file, and its path on standard output.
"""

import argparse

from trl_selfplay.inspection.html_report import DEFAULT_SAMPLES, write_report


def run(flags: list[str]) -> int:
    """Write the report and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="trl-selfplay report",
        description="Write one HTML file of a run: curves, funnel, alarms, samples, settings. It "
        "needs no network and no other file, and can be written while the run goes on.",
    )
    parser.add_argument("output_dir", metavar="DIR", help="The output_dir of the run.")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="DIR", help="Other runs, in the same charts."
    )
    parser.add_argument(
        "--output", metavar="FILE", help="The file to write. Default: DIR/report.html."
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=DEFAULT_SAMPLES,
        metavar="N",
        help="The most samples of each round to show, and the most held-out ones; 0 shows none. "
        "Default: %(default)s.",
    )
    args = parser.parse_args(flags)
    if args.samples < 0:
        parser.error(f"--samples {args.samples}: give 0 or more.")
    print(write_report(args.output_dir, args.output, args.compare, args.samples))
    return 0
