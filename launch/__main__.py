"""`python -m launch sweep FILE [--dry-run] [key=value ...]`."""

import argparse
import sys
from collections.abc import Sequence

from gr.config_io import load_config
from launch.config import SweepConfig
from launch.sweep import describe, expand, run_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0, 1 if a run failed, 2 for a user's mistake, 130 for ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m launch", description="Submit jobs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "Run every combination of a sweep file that is not finished, then compare them."
    sweep = commands.add_parser("sweep", help=text, description=text)
    sweep.add_argument("file", help="YAML file (launch/config.py: SweepConfig)")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="override of the file")
    sweep.add_argument("--dry-run", action="store_true", help="print the runs and exit")
    arguments, rest = parser.parse_known_args(argv)
    # argparse stops collecting overrides at the first option.
    arguments.overrides += [text for text in rest if not text.startswith("-")]
    unknown = [text for text in rest if text.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        config, _ = load_config(SweepConfig, arguments.file, arguments.overrides)
        members = expand(config)
        if arguments.dry_run:
            _say(describe(members))
            return 0
        if not config.scheduler:
            return 0 if run_sweep(config, members, say=_say) else 1
        # TorchX is an extra that sweeps on this machine do without.
        from launch.submit import TorchXRuns

        jobs = TorchXRuns(config)
        done = run_sweep(config, members, say=_say, submit=jobs, cancel=jobs.cancel)
        return 0 if done else 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except ValueError as error:
        sys.stderr.write(f"launch sweep: error: {error}\n")
        return 2


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
