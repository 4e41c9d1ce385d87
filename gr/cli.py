"""The command line: `gr COMMAND ...`, the same as `python -m gr COMMAND ...`.

A user's mistake is one message on stderr and exit status 2; a defect of ours keeps its traceback.
Heavy modules are imported by the command that needs them.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gr.atomic import CheckpointError
from gr.config_io import load_config
from gr.serve_config import ServeConfig
from gr.versions import check_versions

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
# Errors that a path of the user causes, whoever notices.
_PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_RUN_ERRORS = (FloatingPointError, CheckpointError)
_ON_RANKS = ("train", "evaluate", "recommend")
_OURS = ("gr", "embeddings", "kernels", "pipelines", "launch")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments; None means those of the process.

    Returns:
        Exit status: 0, 1 for a run that went wrong (a loss that is not finite, a rank lost, a full
        disk), 2 for a user's mistake, 130 for ctrl-C.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "overrides"):
        # argparse stops collecting overrides at the first option.
        arguments.overrides += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, *_RUN_ERRORS, *_PATH_ERRORS) as error:
        if arguments.traceback or not _is_users(error):
            raise
        who = _speaker(arguments.command)
        print(f"{who}gr {arguments.command}: error: {_text(error)}", file=sys.stderr)
        return FAILED if isinstance(error, _RUN_ERRORS) else USER_ERROR
    except RuntimeError as error:
        message = _lost_rank(error) if arguments.command in _ON_RANKS else None
        if message is None or arguments.traceback:
            raise
        who = _speaker(arguments.command)
        print(f"{who}gr {arguments.command}: error: {message}", file=sys.stderr)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gr", description="Train generative recommenders.")
    parser.add_argument("--version", action="version", version=f"gr {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, **options: Any) -> argparse.ArgumentParser:
        child = commands.add_parser(name, help=text, description=text, **options)
        child.set_defaults(run=run, traceback=False)
        return child

    for name, run, text in (
        ("sessionize", _sessionize, "Turn an event log into a session-end log."),
        ("synthesize", _synthesize, "Make a synthetic log from a seed."),
        ("train", _train, "Train and evaluate in one pass over a session-end log."),
    ):
        child = command(name, run, text)
        child.add_argument("config", help="YAML file")
        child.add_argument("overrides", nargs="*", metavar="key=value", help="override of the file")
        child.add_argument("--print-config", action="store_true", help="print the result and exit")
        child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("evaluate", _evaluate, "Score a log with a checkpoint, learning nothing.")
    child.add_argument("run_dir", metavar="RUN", help="run directory")
    child.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override of the run, as data.log=OTHER"
    )
    child.add_argument("--step", type=int, help="of the checkpoint; the newest if not given")
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("recommend", _recommend, "Score a log with a checkpoint: Parquet out.")
    child.add_argument("run_dir", metavar="RUN", help="run directory")
    child.add_argument(
        "output", metavar="OUTPUT", help="folder of the scores; goes on after a kill"
    )
    child.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override of the run, as data.log=OTHER"
    )
    child.add_argument("--step", type=int, help="of the checkpoint; the newest if not given")
    child.add_argument(
        "--steps-per-file", type=int, default=128, help="global batches of one file (128)"
    )
    child.add_argument("--top", type=int, help="instead: so many items for every user of the log")
    child.add_argument("--retrieve", type=int, default=100, help="of --top: items found (100)")
    child.add_argument("--exclude-seen", action="store_true", help="of --top: not what was met")
    child.add_argument("--time", type=int, default=0, help="of --top: s; 0: after the log")
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("serve", _serve, "Recommendations over HTTP, with a checkpoint.")
    child.add_argument("run_dir", metavar="RUN", help="run directory")
    child.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override of the run, as data.log=OTHER"
    )
    child.add_argument("--step", type=int, help="of the checkpoint; the newest if not given")
    for field in fields(ServeConfig):
        flag = "--" + field.name.replace("_", "-")
        text = f"see docs/inference.md ({field.default!r})"
        child.add_argument(flag, type=field.type, default=field.default, metavar="X", help=text)
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("export", _export, "Write a checkpoint for inference, tables in few bits.")
    child.add_argument("run_dir", metavar="RUN", help="run directory")
    child.add_argument("output", metavar="OUTPUT", help="folder to write")
    child.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override of the run, as data.log=OTHER"
    )
    child.add_argument("--step", type=int, help="of the checkpoint; the newest if not given")
    child.add_argument("--tables", default="fp16", help="fp32, fp16, int8 or int4 (fp16)")
    child.add_argument("--aot", action="store_true", help="compile the dense part ahead of time")
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("dataset", _dataset, "Turn a public dataset into an event log.")
    child.add_argument("name", metavar="NAME", help="as in docs/datasets.md; `list` shows all")
    child.add_argument("source", nargs="?", help="publisher's files: folder, archive or file")
    child.add_argument("output", nargs="?", help="folder of the event log")
    child.add_argument("--download", action="store_true", help="fetch into the folder SOURCE first")
    child.add_argument("--overwrite", action="store_true", help="replace an event log at OUTPUT")
    child.add_argument(
        "--partial", action="store_true", help="accept another number of rows than published"
    )
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("inspect", _inspect, "Describe a session-end log: counts, plots, sequences.")
    child.add_argument("log", metavar="LOG", help="folder of a session-end log")
    child.add_argument("--config", help="YAML file of gr train: how the log becomes sequences")
    child.add_argument("--output", help="folder of text and plots; LOG_inspect if not given")
    child.add_argument("--sequences", type=int, default=3, help="printed as tokens (3)")
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("cost", _cost, "Count FLOPs and bytes of a run from its log; train nothing.")
    child.add_argument("config", help="YAML file of gr train")
    child.add_argument("overrides", nargs="*", metavar="key=value", help="override of the file")
    child.add_argument("--batches", type=int, default=0, help="read so many; all if not given")
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("report", _report, "Compare runs: table, report.md, CSV and plots.")
    child.add_argument("runs", nargs="+", help="run directories; seeds of one config are grouped")
    child.add_argument("--output", help="folder of the report; the first run if not given")
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("results", _results, "Keep records of runs and make docs/results.md of them.")
    child.add_argument("page", help="YAML file: which row of which table a run is")
    child.add_argument("runs", nargs="*", help="run directories of a sweep, or ROW=DIRECTORY")
    child.add_argument("--output", required=True, help="Markdown file; records go beside it")
    child.add_argument("--again", nargs="+", default=[], help="runs of rows that are recorded")
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("scaling", _scaling, "Train a ladder of sizes and fit scaling laws.")
    child.add_argument("config", help="YAML file (gr/scaling/config.py)")
    child.add_argument("overrides", nargs="*", metavar="key=value", help="override of the file")
    child.add_argument("--fit", action="store_true", help="train nothing: fit the finished runs")
    child.add_argument("--traceback", action="store_true", help="show it also for user errors")

    child = command("checkpoint", _checkpoint, "Look into a checkpoint.")
    child.add_argument("action", choices=["inspect"])
    child.add_argument("path", help="step_N folder, checkpoints folder or run directory")

    command("bench", _bench, "Time operators (gr bench --help).", add_help=False)
    return parser


def _version() -> str:
    try:
        return metadata.version("gr-recsys")
    except metadata.PackageNotFoundError:
        return "(run from its folder, not installed)"


def _sessionize(arguments: argparse.Namespace) -> None:
    check_versions()
    from pipelines.config import SessionizeConfig

    config, resolved = load_config(SessionizeConfig, arguments.config, arguments.overrides)
    if arguments.print_config:
        print(OmegaConf.to_yaml(resolved), end="")
        return
    from pipelines.sessionize import sessionize

    sessionize(config)
    print(f"wrote {config.output}")


def _synthesize(arguments: argparse.Namespace) -> None:
    check_versions()
    from pipelines.synthetic.config import SyntheticConfig

    config, resolved = load_config(SyntheticConfig, arguments.config, arguments.overrides)
    if arguments.print_config:
        print(OmegaConf.to_yaml(resolved), end="")
        return
    from pipelines.synthetic.synthesize import synthesize

    num_events = synthesize(config)
    print(f"wrote {num_events} events to {config.output}")


def _train(arguments: argparse.Namespace) -> None:
    check_versions()
    from gr.config import TrainConfig
    from gr.parallel import environment_rank

    try:
        config, resolved = load_config(TrainConfig, arguments.config, arguments.overrides)
    except ValueError:
        # The same on every rank, so that one message is enough.
        if environment_rank() == 0:
            raise
        sys.exit(USER_ERROR)
    if arguments.print_config:
        if environment_rank() == 0:
            print(OmegaConf.to_yaml(resolved), end="")
        return
    from gr.train import train

    train(config, resolved, arguments.overrides)


def _evaluate(arguments: argparse.Namespace) -> None:
    check_versions()
    from gr.evaluate import evaluate

    config = _config_of_run(arguments)
    evaluate(config, arguments.run_dir, step=arguments.step, overrides=arguments.overrides)


def _recommend(arguments: argparse.Namespace) -> None:
    check_versions()
    if arguments.top is not None:
        from gr.inference.recommend_users import TopItems, recommend_users

        names = ("top", "retrieve", "exclude_seen", "time")
        what = TopItems(**{name: getattr(arguments, name) for name in names})
        recommend_users(
            _config_of_run(arguments),
            arguments.run_dir,
            arguments.output,
            what,
            step=arguments.step,
            overrides=arguments.overrides,
        )
        return
    if arguments.exclude_seen or arguments.time:
        raise ValueError("--exclude-seen and --time are of --top: say how many items")
    from gr.inference.recommend import recommend

    recommend(
        _config_of_run(arguments),
        arguments.run_dir,
        arguments.output,
        step=arguments.step,
        overrides=arguments.overrides,
        steps_per_file=arguments.steps_per_file,
    )


def _export(arguments: argparse.Namespace) -> None:
    check_versions()
    from gr.inference.export import export

    flags = {"tables": arguments.tables, "step": arguments.step, "aot": arguments.aot}
    print(export(_config_of_run(arguments), arguments.run_dir, arguments.output, **flags))


def _serve(arguments: argparse.Namespace) -> None:
    check_versions()
    chosen = {field.name: getattr(arguments, field.name) for field in fields(ServeConfig)}
    serve_config = ServeConfig(**chosen)
    config = _config_of_run(arguments)
    from gr.inference.server import serve

    serve(config, arguments.run_dir, serve_config, step=arguments.step)


def _config_of_run(arguments: argparse.Namespace) -> Any:
    """Return the configuration of a run directory; a mistake is told once, by rank 0."""
    from gr.evaluate import run_config
    from gr.parallel import environment_rank

    try:
        return run_config(arguments.run_dir, arguments.overrides)
    except ValueError:
        if environment_rank() == 0:
            raise
        sys.exit(USER_ERROR)


def _dataset(arguments: argparse.Namespace) -> None:
    from pipelines.datasets.catalogue import find, listing

    if arguments.name == "list":
        print(listing())
        return
    dataset = find(arguments.name)
    if arguments.source is None or arguments.output is None:
        raise ValueError(
            f"expected gr dataset {dataset.name} SOURCE OUTPUT: the publisher's files "
            "(folder, archive or file) and the folder of the event log"
        )
    from pipelines.datasets.convert import convert
    from pipelines.datasets.download import download
    from pipelines.location import locate

    source = Path(arguments.source)
    if arguments.download:
        print(f"{dataset.name}: {dataset.terms}")
        source, checksum = download(dataset, source)
        print(f"{source}: {checksum}")
    flags = {"overwrite": arguments.overwrite, "partial": arguments.partial}
    print(convert(dataset, source, locate(arguments.output), **flags))


def _cost(arguments: argparse.Namespace) -> None:
    check_versions()
    from gr.config import TrainConfig
    from gr.cost import cost_of, describe

    overrides = [*arguments.overrides, "run_dir=none"]
    config, _ = load_config(TrainConfig, arguments.config, overrides)
    on_gpu = config.device != "cpu"
    print(describe(cost_of(config, num_batches=arguments.batches, on_gpu=on_gpu)))


def _inspect(arguments: argparse.Namespace) -> None:
    check_versions()
    from gr.config import TrainConfig
    from gr.inspect_log import inspect

    data = None
    if arguments.config:
        override = [f"data.log={arguments.log}"]
        data = load_config(TrainConfig, arguments.config, override)[0].data
    # Beside the log; of a URL in the working folder.
    beside = Path(arguments.log.rsplit("/", 1)[-1] if "://" in arguments.log else arguments.log)
    output = arguments.output or beside.with_name(f"{beside.name}_inspect")
    print(inspect(arguments.log, output, data=data, num_sequences=arguments.sequences))


def _report(arguments: argparse.Namespace) -> None:
    from gr.report import report

    print(report(arguments.runs, arguments.output))


def _results(arguments: argparse.Namespace) -> None:
    from gr.results import results

    print(results(arguments.page, arguments.runs, arguments.output, again=arguments.again))


def _scaling(arguments: argparse.Namespace) -> None:
    check_versions()
    from gr.scaling.config import ScalingConfig

    config, _ = load_config(ScalingConfig, arguments.config, arguments.overrides)
    from gr.scaling.study import scaling

    print(scaling(config, only_fit=arguments.fit))


def _checkpoint(arguments: argparse.Namespace) -> None:
    from gr.checkpoint_inspect import inspect

    print(inspect(arguments.path))


def _bench(arguments: argparse.Namespace) -> None:
    from gr import bench

    sys.exit(bench.main(arguments.rest))


def _is_users(error: BaseException) -> bool:
    """Return whether an error is about a path, or was raised by a check of ours."""
    if isinstance(error, _PATH_ERRORS):
        return True
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return str(innermost.f_globals.get("__name__", "")).split(".")[0] in _OURS


def _speaker(command: str) -> str:
    """Return "" on rank 0, else a prefix: a rank may meet a bad record that no other sees."""
    if command not in _ON_RANKS:
        return ""
    from gr.parallel import environment_rank

    return f"[rank {environment_rank()}] " if environment_rank() else ""


def _lost_rank(error: RuntimeError) -> str | None:
    from gr.parallel import lost_rank

    return lost_rank(error)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
