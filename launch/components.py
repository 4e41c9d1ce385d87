"""TorchX components: `torchx run -s SCHEDULER launch/components.py:train --config FILE -j 2x4`.

docs/distributed.md has the commands. TorchX executes this file, reads the signatures for its
command line and the docstrings for its help; everything else is in launch/job.py. Of types it
knows Dict, List and Optional in these spellings only.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Dict, List, Optional

from torchx import specs

from gr.config_io import load_config
from launch.config import ClusterConfig, SweepConfig
from launch.job import evaluate_job, load_cluster, sweep_job, train_job
from launch.layout import Layout
from launch.sweep import expand


def train(
    *overrides: str,
    config: str,
    j: str = "1x1",
    cluster: str = "",
    cluster_set: Optional[List[str]] = None,
    image: str = "",
    env: Optional[Dict[str, str]] = None,
    name: str = "",
    log_dir: str = "",
    rdzv_port: int = 0,
) -> specs.AppDef:
    """Train and evaluate in one pass over a session-end log.

    Args:
        overrides: key=value over the configuration, last on the command line
        config: YAML file of gr train
        j: NODESxPROCESSES
        cluster: YAML file that says what to ask of a node (configs/clusters/)
        cluster_set: key=value over that file, separated by commas (restarts=5,retries=2)
        image: container image, over that of the cluster file
        env: environment, over that of the cluster file (NCCL_DEBUG=INFO,NCCL_IB_HCA=mlx5_0)
        name: of the job; that of the configuration if not given
        log_dir: folder on shared storage for what each process prints
        rdzv_port: port of node 0 where the nodes meet; a free one if not given
    """

    def job() -> specs.AppDef:
        node = _cluster(cluster, cluster_set, image, env)
        options = {"name": name, "log_dir": log_dir}
        return train_job(config, overrides, j=j, cluster=node, rdzv_port=rdzv_port, **options)

    return _or_exit("train", job)


def evaluate(
    *overrides: str,
    run: str,
    j: str = "1x1",
    step: int = -1,
    cluster: str = "",
    cluster_set: Optional[List[str]] = None,
    image: str = "",
    env: Optional[Dict[str, str]] = None,
    name: str = "",
    log_dir: str = "",
    rdzv_port: int = 0,
) -> specs.AppDef:
    """Score a log with a checkpoint, learning nothing.

    Args:
        overrides: key=value over the run's configuration, last on the command line
        run: run directory, on storage that the nodes share
        j: NODESxPROCESSES
        step: of the checkpoint; the newest if not given
        cluster: YAML file that says what to ask of a node (configs/clusters/)
        cluster_set: key=value over that file, separated by commas
        image: container image, over that of the cluster file
        env: environment, over that of the cluster file
        name: of the job; that of the run if not given
        log_dir: folder on shared storage for what each process prints
        rdzv_port: port of node 0 where the nodes meet; a free one if not given
    """

    def job() -> specs.AppDef:
        node = _cluster(cluster, cluster_set, image, env)
        options = {"name": name, "log_dir": log_dir}
        return evaluate_job(
            run, overrides, j=j, step=step, cluster=node, rdzv_port=rdzv_port, **options
        )

    return _or_exit("evaluate", job)


def sweep(
    *overrides: str,
    file: str,
    cluster: str = "",
    cluster_set: Optional[List[str]] = None,
    image: str = "",
    env: Optional[Dict[str, str]] = None,
    name: str = "",
) -> specs.AppDef:
    """Work a sweep off on one node, then compare its runs.

    Args:
        overrides: key=value over the sweep file, last on the command line
        file: YAML file of python -m launch sweep
        cluster: YAML file that says what to ask of the node (configs/clusters/)
        cluster_set: key=value over that file, separated by commas
        image: container image, over that of the cluster file
        env: environment, over that of the cluster file
        name: of the job; that of the file if not given
    """

    def job() -> specs.AppDef:
        config, _ = load_config(SweepConfig, file, overrides)
        expand(config)
        if config.scheduler:
            raise ValueError(
                f"{file} submits its runs to {config.scheduler} itself: start it with python -m "
                "launch sweep, or give scheduler=''"
            )
        processes = config.jobs * Layout.parse(config.j).size
        node = _cluster(cluster, cluster_set, image, env)
        return sweep_job(file, overrides, processes=processes, cluster=node, name=name)

    return _or_exit("sweep", job)


def _cluster(
    path: str,
    overrides: Optional[List[str]],
    image: str,
    env: Optional[Dict[str, str]],
) -> ClusterConfig:
    cluster = load_cluster(path, overrides or ())
    return replace(cluster, image=image or cluster.image, env={**cluster.env, **(env or {})})


def _or_exit(name: str, job: Callable[[], specs.AppDef]) -> specs.AppDef:
    # TorchX would show a traceback of its own files.
    try:
        return job()
    except ValueError as error:
        raise SystemExit(f"launch {name}: error: {error}") from error
