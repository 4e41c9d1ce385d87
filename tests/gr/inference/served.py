"""A small trained run, and what serves it."""

import torch

from gr.evaluate import run_config
from gr.inference.engine import load_recommender
from gr.parallel import World
from tests.e2e.toy import run, write_config, write_log


def toy_run(folder, *overrides, without=()):
    """Train a run on 24 users and return its directory.

    Args:
        folder: of log, configuration and run.
        overrides: key=value.
        without: beginnings of lines to leave out of the configuration.
    """
    config = write_config(folder, write_log(folder, users=24))
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(x for x in lines if not x.strip().startswith(tuple(without))))
    return run(config, "max_steps=4", "checkpoint.every_steps=4", *overrides)


def toy_recommender(run_dir, *overrides, **options):
    """Return what answers questions with the run's checkpoint."""
    config = run_config(run_dir, overrides)
    return load_recommender(config, str(run_dir), world=World(0, 1, torch.device("cpu")), **options)
