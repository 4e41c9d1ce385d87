"""A Slurm cluster of two nodes on this machine: slurmctld, two `slurmd -N`, munged; no systemd."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scontrol")

CONF = """
ClusterName=gr
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until the credential of its first start has expired, by default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# Containers have no cgroups to give away.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1
# More cores than this machine may have.
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=gr0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=16000
NodeName=gr1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=16000
PartitionName=debug Nodes=gr0,gr1 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return what is not installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class SlurmCluster:
    """Context manager; `environment` makes Slurm's commands talk to this cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "SlurmCluster":
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        conf = CONF.format(folder=self.folder, host=host, user=user, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(conf)
        try:
            files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
            socket_file = self.folder / "munge.socket"
            files += [f"--key-file={key}", f"--socket={socket_file}"]
            self._start("munged", "--foreground", "--force", *files)
            self._wait_for("munged", socket_file.exists)
            self._start("slurmctld", "-D", "-i")
            for name in ("gr0", "gr1"):
                self._start("slurmd", "-D", "-N", name)
            self._wait_for("nodes", lambda: self.run("sinfo", "-h", "-o", "%T %D") == "idle 2")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str) -> str:
        """Return what a command prints, "" if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    def wait_for_job(self, job: str, timeout_s: float) -> None:
        """Return when a job is no longer queued or running."""
        self._wait_for(
            f"job {job}", lambda: not self.run("squeue", "-h", "-j", job, "-o", "%T"), timeout_s
        )

    def logs(self) -> str:
        """Return the ends of the daemons' logs, for a message."""
        texts = [f"{p.name}:\n{p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.log"))]
        return "\n".join(texts)

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}-{len(self._daemons)}.console.log").open("w") as console:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments],
                    env=self.environment,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                )
            )

    def _wait_for(self, what: str, is_there: Callable[[], object], timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_there():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not there after {timeout_s} s\n{self.logs()}")
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
