"""A job: N nodes that each run torchrun on a `gr` command. Free of torch.

What a node executes is one shell script, the same under every TorchX scheduler: it finds node 0,
meets the other nodes there and starts the processes. Retries resume: every process gets the job's
id, and `gr train` goes on with a run directory that the same job began (gr/runlog.py).
"""

import math
import random
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from torchx import specs

from gr.config import TrainConfig
from gr.config_io import load_config
from launch.config import ClusterConfig
from launch.layout import Layout

# Below what Linux hands out to outgoing connections (32768 and up), above what services listen on.
PORTS = range(20_000, 32_768)
# A process before its tables: 0.9 to 1.5 GB measured in configs/sweeps/quickstart_sizes.yaml on a
# CPU; the rest is for longer histories, batches read ahead and the host side of CUDA.
PROCESS_GB = 6.0
# Host bytes for each parameter of a table: weight, first moment and gradient in fp32.
TABLE_BYTES = 12
NO_IMAGE = "no-image-given"


def load_cluster(path: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Return the cluster of a file; "" means the defaults.

    Raises:
        ValueError: if the file or an override does not fit.
    """
    return load_config(ClusterConfig, path or None, overrides)[0]


def train_job(
    config: str,
    overrides: Sequence[str],
    *,
    j: str,
    cluster: ClusterConfig,
    name: str = "",
    log_dir: str = "",
    rdzv_port: int = 0,
) -> specs.AppDef:
    """Return a job that trains. The configuration is checked here, before it waits in a queue.

    Args:
        config: YAML file of `gr train`, as the nodes see it too.
        overrides: key=value.
        j: NODESxPROCESSES.
        cluster: what to ask of a node.
        name: of the job; "" means that of the file.
        log_dir: folder on shared storage for what each process prints; "" means the job's own log
            only.
        rdzv_port: of node 0, where the nodes meet; 0 means one that is free here.

    Raises:
        ValueError: if the configuration or the layout is not valid, or the run directory would be
            lost with the container.
    """
    run, _ = load_config(TrainConfig, config, overrides)
    layout = Layout.parse(j)
    _refuse_lost_run_dir(run.run_dir, cluster)
    return _job(
        "train",
        ["train", config, *overrides],
        name=name or f"train-{Path(config).stem}",
        layout=layout,
        cluster=cluster,
        device=run.device,
        memory_gb=cluster.memory_gb_per_node or host_memory_gb(run, layout),
        log_dir=log_dir,
        rdzv_port=rdzv_port,
    )


def evaluate_job(
    run_dir: str,
    overrides: Sequence[str],
    *,
    j: str,
    cluster: ClusterConfig,
    step: int = -1,
    name: str = "",
    log_dir: str = "",
    rdzv_port: int = 0,
) -> specs.AppDef:
    """Return a job that scores a log with a checkpoint; arguments as of `train_job`.

    Args:
        run_dir: the run directory; read here if it can be, for memory and device.
        overrides: key=value over the run's configuration.
        j: NODESxPROCESSES.
        cluster: what to ask of a node.
        step: of the checkpoint; -1 means the newest.
        name: of the job; "" means that of the run.
        log_dir: folder on shared storage for what each process prints.
        rdzv_port: of node 0.

    Raises:
        ValueError: as `train_job`, or if there is no such run directory.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is not a run directory that this machine can see: {path} is missing. Name "
            "what `gr train` wrote, on storage that the nodes share with this machine."
        )
    run, _ = load_config(TrainConfig, path, overrides)
    layout = Layout.parse(j)
    return _job(
        "evaluate",
        ["evaluate", run_dir, *overrides, *(["--step", str(step)] if step >= 0 else [])],
        name=name or f"evaluate-{Path(run_dir).name}",
        layout=layout,
        cluster=cluster,
        device=run.device,
        memory_gb=cluster.memory_gb_per_node or host_memory_gb(run, layout),
        log_dir=log_dir,
        rdzv_port=rdzv_port,
    )


def sweep_job(
    file: str, overrides: Sequence[str], *, processes: int, cluster: ClusterConfig, name: str = ""
) -> specs.AppDef:
    """Return a job of one node that works a sweep off, its runs as processes of that node.

    Args:
        file: YAML file of SweepConfig.
        overrides: key=value over the file.
        processes: all that run at once, for the resources: `jobs` times those of a run.
        cluster: what to ask of the node.
        name: of the job; "" means that of the file.
    """
    memory_gb = cluster.memory_gb_per_node or processes * PROCESS_GB
    command = shlex.join([_python(cluster), "-m", "launch", "sweep", file, *overrides])
    return _app(
        "sweep",
        "\n".join([*_exports(cluster, 1), f"exec {_plain(command)}"]),
        name=name or f"sweep-{Path(file).stem}",
        layout=Layout(1, processes),
        cluster=cluster,
        device="auto",
        memory_gb=memory_gb,
    )


def host_memory_gb(run: TrainConfig, layout: Layout) -> float:
    """Return an estimate of the host memory of a node, in GB.

    Replicated tables stand in every process; sharded ones are spread over all, and half of one
    process' share is added, because shards are not of one size.
    """
    parameters = sum(t.num_embeddings * t.dim for t in run.embeddings.tables.values())
    sharded = run.embeddings.form == "sharded" or (
        run.embeddings.form == "auto" and run.device == "cuda"
    )
    share = 1.5 / layout.size if sharded and layout.size > 1 else 1.0
    process = PROCESS_GB + parameters * TABLE_BYTES * share / 1e9
    return layout.processes * process


def free_port() -> int:
    """Return a port of PORTS that nothing on this machine listens on, a new one at each call.

    Two jobs on one node then do not meet at one port, as they would at torchrun's fixed 29500.
    """
    candidates = random.sample(PORTS, 32)
    for port in candidates:
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    return candidates[-1]


def _job(
    role: str,
    command: Sequence[str],
    *,
    name: str,
    layout: Layout,
    cluster: ClusterConfig,
    device: str,
    memory_gb: float,
    log_dir: str,
    rdzv_port: int,
) -> specs.AppDef:
    script = _torchrun_script(command, layout, cluster, log_dir, rdzv_port or free_port())
    return _app(
        role,
        script,
        name=name,
        layout=layout,
        cluster=cluster,
        device=device,
        memory_gb=memory_gb,
    )


def _app(
    role: str,
    script: str,
    *,
    name: str,
    layout: Layout,
    cluster: ClusterConfig,
    device: str,
    memory_gb: float,
) -> specs.AppDef:
    gpus = _gpus_per_process(cluster, device)
    resource = specs.Resource(
        cpu=layout.processes * (cluster.cpus_per_process or (8 if gpus else 2)),
        gpu=layout.processes * gpus,
        memMB=math.ceil(memory_gb * 1000),
    )
    options = [part for mount in cluster.mounts for part in mount.split(",")]
    return specs.AppDef(
        name=name,
        roles=[
            specs.Role(
                name=role,
                image=cluster.image or NO_IMAGE,
                entrypoint="bash",
                args=["-c", script],
                num_replicas=layout.nodes,
                resource=resource,
                max_retries=cluster.retries,
                # All nodes again: a node that comes back alone would wait for the others.
                retry_policy=specs.RetryPolicy.APPLICATION,
                mounts=specs.parse_mounts(options),
            )
        ],
    )


def _torchrun_script(
    command: Sequence[str], layout: Layout, cluster: ClusterConfig, log_dir: str, port: int
) -> str:
    """Return what a node runs. TorchX fills in ${app_id}, ${replica_id} and ${rank0_env}."""
    macros = specs.macros
    lines = _exports(cluster, cluster.cpus_per_process or 1)
    if layout.nodes == 1:
        endpoint, is_host = "localhost:0", "true"
    else:
        lines += [
            f'head="$${{{macros.rank0_env}:-localhost}}"',
            # Slurm names a node as its configuration does, which need not be a name on the network.
            'if ! getent hosts "$head" > /dev/null && command -v scontrol > /dev/null; then',
            '  head=$(scontrol show node "$head" --oneliner | sed "s/.* NodeAddr=//; s/ .*//")',
            "fi",
            # torchrun would guess this from names, and wait for ever where names mislead.
            f'if [ "{macros.replica_id}" = 0 ]; then is_host=true; else is_host=false; fi',
            f'echo "node {macros.replica_id} of {layout.nodes}: job {macros.app_id} meets at '
            f'$head:{port}, waiting up to {cluster.join_timeout_s} s for all nodes" >&2',
        ]
        endpoint, is_host = f'"$head:{port}"', "$is_host"
    timeouts = ",".join(
        f"{key}={cluster.join_timeout_s}" for key in ("join_timeout", "read_timeout")
    )
    parts = [
        f"exec {shlex.quote(_python(cluster))} -m torch.distributed.run",
        f"--nnodes {layout.nodes} --nproc-per-node {layout.processes}",
        f"--max-restarts {cluster.restarts}",
        f'--rdzv-backend c10d --rdzv-id "{macros.app_id}" --rdzv-endpoint {endpoint}',
        f"--rdzv-conf {timeouts},is_host={is_host}",
        "--tee 3" + (f" --log-dir {_plain(shlex.quote(log_dir))}" if log_dir else ""),
        f"-m gr {_plain(shlex.join(command))}",
    ]
    return "\n".join([*lines, " \\\n  ".join(parts)])


def _exports(cluster: ClusterConfig, threads: int) -> list[str]:
    # In the script, because srun cuts the values of --export at their commas.
    env = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
        # Else all restarts share one store, and a rank may read there where its peers listened
        # before they were restarted: it then never meets them (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **cluster.env,
    }
    for key in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ValueError(f"env: expected the name of a variable, found {key!r}")
    return [f"export {key}={_plain(shlex.quote(value))}" for key, value in env.items()]


def _plain(text: str) -> str:
    """Return text that TorchX's templates leave as it is."""
    return text.replace("$", "$$")


def _python(cluster: ClusterConfig) -> str:
    return cluster.python or ("python" if cluster.image else sys.executable)


def _gpus_per_process(cluster: ClusterConfig, device: str) -> int:
    if cluster.gpus_per_process >= 0:
        return cluster.gpus_per_process
    return 1 if device == "cuda" else 0


def _refuse_lost_run_dir(run_dir: str, cluster: ClusterConfig) -> None:
    if not cluster.image:
        return
    folders = [
        part.removeprefix("dst=")
        for mount in cluster.mounts
        for part in mount.split(",")
        if part.startswith("dst=")
    ]
    if not any(PurePosixPath(run_dir).is_relative_to(folder) for folder in folders):
        raise ValueError(
            f"run_dir={run_dir} is inside the container and would be lost with it: give a folder "
            f"of a mounted volume ({', '.join(folders) or 'none is mounted: cluster mounts'})"
        )
