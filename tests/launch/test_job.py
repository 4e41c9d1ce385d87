import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
from torchx.cli.main import main as torchx_main
from torchx.specs import macros

from gr.config import TrainConfig
from gr.config_io import load_config
from launch.config import ClusterConfig
from launch.job import NO_IMAGE, PORTS, free_port, host_memory_gb, load_cluster, train_job
from launch.layout import Layout

RUN = """
run_dir: runs/x
data: {log: absent, num_items: 9, num_negatives: 2}
embeddings:
  tables:
    item: {num_embeddings: 10, dim: 8, features: [item_id, target_item_id, negative_item_id]}
"""
# Says what the node's script would have started, and in which environment.
ECHO = """#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "some.yaml"
    path.write_text(RUN)
    return str(path)


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text(ECHO.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("j", "expected"), [("2x4", (2, 4)), ("1x1", (1, 1)), ("8", (1, 8)), ("16x8", (16, 8))]
)
def test_layout(j, expected):
    layout = Layout.parse(j)
    assert (layout.nodes, layout.processes, layout.size) == (*expected, expected[0] * expected[1])


@pytest.mark.parametrize("j", ["", "2x", "x4", "0x4", "2x0", "2y4", "1:2x4", "2x4x1", "-1x2", " 2"])
def test_a_layout_that_is_none(j):
    with pytest.raises(ValueError, match=r"-j: expected NODESxPROCESSES, as in 2x4"):
        Layout.parse(j)


def test_ports_differ_and_are_free():
    ports = {free_port() for _ in range(8)}
    assert len(ports) > 1
    assert all(port in PORTS for port in ports)


def started(app, node, tmp_path, **environment):
    """Run the script of one node; return the arguments of `python -m`, its environment, stderr."""
    values = macros.Values(
        img_root="", app_id="job-17", replica_id=str(node), rank0_env="HEAD_NODE"
    )
    role = values.apply(app.roles[0])
    done = subprocess.run(
        [role.entrypoint, *role.args],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return *json.loads(done.stdout), done.stderr


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


def test_what_two_nodes_start(config, echo, tmp_path):
    cluster = ClusterConfig(python=echo, restarts=5, join_timeout_s=40)
    app = train_job(config, ["max_steps=3"], j="2x4", cluster=cluster, rdzv_port=20123)
    assert (app.name, app.roles[0].num_replicas) == ("train-some", 2)
    for node in (0, 1):
        arguments, environment, said = started(app, node, tmp_path, HEAD_NODE="127.0.0.1")
        assert arguments[:2] == ["-m", "torch.distributed.run"]
        assert arguments[-5:] == ["-m", "gr", "train", config, "max_steps=3"]
        assert option(arguments, "--nnodes") == "2"
        assert option(arguments, "--nproc-per-node") == "4"
        assert option(arguments, "--max-restarts") == "5"
        assert option(arguments, "--rdzv-id") == "job-17"
        assert option(arguments, "--rdzv-backend") == "c10d"
        assert option(arguments, "--rdzv-endpoint") == "127.0.0.1:20123"
        is_host = "true" if node == 0 else "false"
        timeouts = f"join_timeout=40,read_timeout=40,is_host={is_host}"
        assert option(arguments, "--rdzv-conf") == timeouts
        assert f"node {node} of 2: job job-17 meets at 127.0.0.1:20123" in said
        assert environment["OMP_NUM_THREADS"] == "1"
    # Alone, a node needs no port of its own choosing, and says nothing.
    app = train_job(config, [], j="1x2", cluster=cluster)
    arguments, _, said = started(app, 0, tmp_path)
    assert option(arguments, "--rdzv-endpoint") == "localhost:0"
    assert said == ""


def test_a_node_whose_name_is_not_on_the_network(config, echo, tmp_path):
    # Slurm's scontrol knows the address.
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$3 Arch=x NodeAddr=10.0.0.7 NodeHostName=h"\n')
    scontrol.chmod(0o755)
    app = train_job(config, [], j="2x1", cluster=ClusterConfig(python=echo), rdzv_port=20123)
    path = f"{tmp_path}:{os.environ['PATH']}"
    arguments, *_ = started(app, 1, tmp_path, PATH=path, HEAD_NODE="no-such-node.invalid")
    assert option(arguments, "--rdzv-endpoint") == "10.0.0.7:20123"


def test_text_reaches_the_processes_as_it_was_written(config, echo, tmp_path):
    nasty = ["run_dir=/x/$HOME `id` \"q\" 'p' ${data.log}", "optim.lr=0.1"]
    env = {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "QUOTED": "a 'b' $HOME"}
    cluster = ClusterConfig(python=echo, env=env)
    app = train_job(config, nasty[1:], j="1x1", cluster=cluster, log_dir="/logs of $me")
    arguments, environment, _ = started(app, 0, tmp_path)
    assert {key: environment[key] for key in env} == env
    assert option(arguments, "--log-dir") == "/logs of $me"
    app = train_job(config, ["run_dir=${data.log}/$x 'y'"], j="1x1", cluster=cluster)
    assert started(app, 0, tmp_path)[0][-1] == "run_dir=${data.log}/$x 'y'"
    with pytest.raises(ValueError, match="env: expected the name of a variable, found 'A B'"):
        train_job(config, [], j="1x1", cluster=ClusterConfig(env={"A B": "c"}))


def test_resources_fit_the_tables(config):
    big = "embeddings.tables.item={num_embeddings: 1000000000, dim: 64}"
    cases = {
        # 12 bytes a parameter in every process, or spread over all.
        ("1x2", "replicated"): 2 * (6 + 64 * 12),
        ("1x2", "sharded"): 2 * (6 + 64 * 12 * 1.5 / 2),
        ("4x8", "sharded"): 8 * (6 + 64 * 12 * 1.5 / 32),
        ("1x1", "sharded"): 6 + 64 * 12,
    }
    for (j, form), expected in cases.items():
        run, _ = load_config(TrainConfig, config, [big, f"embeddings.form={form}"])
        assert host_memory_gb(run, Layout.parse(j)) == pytest.approx(expected)

    def resource(*overrides, **cluster):
        node = ClusterConfig(**cluster)
        return train_job(config, overrides, j="2x4", cluster=node).roles[0].resource

    on_cpu = resource()
    assert (on_cpu.cpu, on_cpu.gpu, on_cpu.memMB) == (8, 0, 24_001)
    on_gpu = resource("device=cuda")
    assert (on_gpu.cpu, on_gpu.gpu) == (32, 4)
    asked = resource("device=cuda", cpus_per_process=3, gpus_per_process=0, memory_gb_per_node=9)
    assert (asked.cpu, asked.gpu, asked.memMB) == (12, 0, 9000)


def test_a_run_directory_inside_a_container(config):
    cluster = ClusterConfig(image="gr:1", mounts=("type=volume,src=c,dst=/mnt/gr",))
    with pytest.raises(ValueError, match=r"run_dir=runs/x is inside the container .*/mnt/gr"):
        train_job(config, [], j="1x1", cluster=cluster)
    app = train_job(config, ["run_dir=/mnt/gr/x"], j="1x1", cluster=cluster)
    assert app.roles[0].image == "gr:1"
    assert "exec python -m torch.distributed.run" in app.roles[0].args[1]
    assert train_job(config, [], j="1x1", cluster=ClusterConfig()).roles[0].image == NO_IMAGE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"restarts": -1}, "restarts must be at least 0, got -1"),
        ({"gpus_per_process": -2}, "gpus_per_process must be at least -1"),
        ({"join_timeout_s": 0}, "join_timeout_s must be at least 1"),
        ({"mounts": ("claim:/mnt",)}, "mounts: expected type=volume,src=CLAIM,dst=/mnt/x"),
    ],
)
def test_a_cluster_that_is_none(fields, message):
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**fields)


@pytest.mark.parametrize("path", sorted(Path("configs/clusters").glob("*.yaml")), ids=str)
def test_the_cluster_files(path):
    assert load_cluster(str(path)).gpus_per_process == 1


def torchx(arguments):
    for action in (ArgOnceAction, torchxconfig):
        action.called_args.clear()  # TorchX keeps them for the life of a process
    torchx_main(arguments)


def dry_run(capsys, scheduler, *arguments, component="train", options=()):
    """Return what `torchx run --dryrun` would hand to the scheduler."""
    command = ["run", "--dryrun", "--workspace", "", "-s", scheduler, *options]
    torchx([*command, f"launch/components.py:{component}", *arguments])
    out = capsys.readouterr().out
    return out.partition("=== SCHEDULER REQUEST ===\n")[2]


def test_dry_run_of_a_local_job(config, capsys):
    text = dry_run(capsys, "local_cwd", "--config", config, "-j", "2x2", "max_steps=3")
    assert text.count("torch.distributed.run") == 2
    assert text.count("max_steps=3") == 2
    assert "'bash'" in text


def test_dry_run_of_a_slurm_job(config, capsys, monkeypatch):
    monkeypatch.setenv("TORCHXCONFIG", "configs/clusters/torchxconfig")
    arguments = ["--config", config, "-j", "2x8", "--cluster", "configs/clusters/slurm.yaml"]
    text = dry_run(capsys, "slurm", *arguments, "--env", "NCCL_IB_HCA=mlx5_0,mlx5_1")
    groups = re.findall(r"^#SBATCH --job-name.*", text, re.M)
    assert len(groups) == 2
    for group in groups:
        for part in ("--partition=gpu", "--time=24:00:00", "--mem=1800000"):
            assert part in group
        assert "--cpus-per-task=96 " in group
        assert group.endswith("--gpus-per-task=8")
    assert "TORCHX_MAX_RETRIES=2" in text
    # srun would cut the value at its comma.
    assert "export NCCL_IB_HCA=mlx5_0,mlx5_1\n" in text
    script = text[text.index("#!/bin/bash") :]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


# TorchX warns that Volcano 1.4 did not retry.
@pytest.mark.filterwarnings(r"ignore:\s*Role train configured:UserWarning")
def test_the_kubernetes_manifest(config, capsys):
    cluster = ["--cluster", "configs/clusters/kubernetes.yaml", "--image", "registry/gr:7"]
    arguments = ["--config", config, "-j", "2x8", *cluster, "run_dir=/mnt/gr/run"]
    options = ["-cfg", "namespace=ml,queue=research"]
    text = dry_run(capsys, "kubernetes", *arguments, options=options)
    job = yaml.safe_load(text)
    assert (job["kind"], job["apiVersion"]) == ("Job", "batch.volcano.sh/v1alpha1")
    spec = job["spec"]
    assert (spec["queue"], spec["maxRetry"], len(spec["tasks"])) == ("research", 2, 2)
    assert set(spec["plugins"]) == {"svc", "env"}
    for node, task in enumerate(spec["tasks"]):
        assert task["replicas"] == 1
        # One pod lost is the whole job lost: all start again, and meet again.
        policies = {policy["event"]: policy["action"] for policy in task["policies"]}
        assert policies["PodFailed"] == policies["PodEvicted"] == "RestartJob"
        (container,) = task["template"]["spec"]["containers"]
        assert container["image"] == "registry/gr:7"
        assert container["resources"]["limits"] == {
            "cpu": "96000m",
            "memory": "1800000M",
            "nvidia.com/gpu": "8",
        }
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"/mnt/gr", "/dev/shm"}
        shell, flag, script = container["command"]
        assert (shell, flag) == ("bash", "-c")
        head = "${TORCHX_RANK0_HOST:-localhost}" if node == 0 else "${VC_TRAIN_0_HOSTS:-localhost}"
        assert f'head="{head}"' in script
        assert "exec python -m torch.distributed.run" in script
        assert f'--rdzv-id "{job["metadata"]["name"]}"' in script
        assert "join_timeout=1800" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_components_of_evaluation_and_sweeps(config, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(RUN)
    arguments = ["--run", str(tmp_path), "-j", "2", "--step", "30", "data.log=other"]
    text = dry_run(capsys, "local_cwd", *arguments, component="evaluate")
    assert "-m gr evaluate" in text
    assert "data.log=other --step 30" in " ".join(text.split()).replace("' '", "")
    sweep = tmp_path / "lr.yaml"
    sweep.write_text(f"base: {config}\noutput: o\njobs: 3\ngrid: {{optim.lr: [0.1, 0.2]}}")
    text = dry_run(capsys, "slurm", "--file", str(sweep), "seeds=[0, 1]", component="sweep")
    assert f"-m launch sweep {sweep} " in text
    assert "seeds=[0, 1]" in text
    assert "--cpus-per-task=6 --mem=18000" in text


@pytest.mark.parametrize(
    ("component", "arguments", "message"),
    [
        ("train", ["--config", "absent.yaml"], "absent.yaml: no such file"),
        ("train", ["--config", "{config}", "-j", "2y2"], "found '2y2'"),
        ("train", ["--config", "{config}", "modle.dim=3"], "Did you mean model?"),
        ("train", ["--config", "{config}", "--cluster", "none.yaml"], "none.yaml: no such file"),
        ("train", ["--config", "{config}", "--cluster_set", "retires=1"], "Did you mean retries?"),
        ("evaluate", ["--run", "absent"], "absent is not a run directory that this machine"),
        ("sweep", ["--file", "absent.yaml"], "absent.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_queued(config, component, arguments, message):
    command = ["run", "--dryrun", "-s", "slurm", f"launch/components.py:{component}"]
    with pytest.raises(SystemExit) as stopped:
        torchx([*command, *(text.format(config=config) for text in arguments)])
    assert str(stopped.value).startswith(f"launch {component}: error: ")
    assert message in str(stopped.value)
