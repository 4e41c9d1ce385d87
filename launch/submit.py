"""The runs of a sweep as TorchX jobs."""

import json
import subprocess
import threading
import time
from typing import Any

from torchx.runner import config as torchx_config
from torchx.runner import get_runner

from launch.config import SweepConfig
from launch.job import load_cluster, train_job
from launch.sweep import Member

POLL_S = 5.0


class TorchXRuns:
    """Submits members, each as a job, and waits for them.

    A job outlives the sweep that submitted it (but for local_cwd): started again, the sweep finds
    the job's handle beside the member's log and waits for it instead of submitting another, which
    would write into the same run directory.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        """Check scheduler, its arguments and the cluster file.

        Raises:
            ValueError: if one of them does not fit.
        """
        self.sweep = sweep
        self.cluster = load_cluster(sweep.cluster)
        self.runner = get_runner()
        known = self.runner.scheduler_backends()
        if sweep.scheduler not in known:
            raise ValueError(
                f"scheduler: expected one of {', '.join(known)}, found {sweep.scheduler!r}"
            )
        # Made here, not by the first thread: the local one sets signal handlers.
        options = self.runner.scheduler_run_opts(sweep.scheduler)
        self.arguments: dict[str, Any] = dict(sweep.scheduler_args)
        torchx_config.apply(scheduler=sweep.scheduler, cfg=self.arguments)
        try:
            options.resolve(self.arguments)
        except Exception as error:  # TorchX has no common base of these
            raise ValueError(f"scheduler_args: {error}") from error
        self._running: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, member: Member) -> int:
        """Run a member to its end and return 0, or 1 if its job failed."""
        member.log.parent.mkdir(parents=True, exist_ok=True)
        record = member.log.with_suffix(".job")
        handle = record.read_text(encoding="utf-8").strip() if record.exists() else ""
        if not (handle and self._is_active(handle)):
            handle = self._submit(member)
            record.write_text(handle + "\n", encoding="utf-8")
        with self._lock:
            self._running.add(handle)
        while self._is_active(handle):
            time.sleep(POLL_S if self._outlives_us else 0.5)
        with self._lock:
            self._running.discard(handle)
        return 0 if member.is_finished() else 1

    def cancel(self) -> None:
        """Cancel what runs."""
        with self._lock:
            for handle in self._running:
                self.runner.cancel(handle)

    @property
    def _outlives_us(self) -> bool:
        return not self.sweep.scheduler.startswith("local")

    def _submit(self, member: Member) -> str:
        app = train_job(
            member.base,
            member.arguments(),
            j=self.sweep.j,
            cluster=self.cluster,
            name=f"sweep-{member.id}",
        )
        with self._lock:
            # Ready images and the folder as it is: a snapshot a run would be one of many.
            handle = str(
                self.runner.run(app, self.sweep.scheduler, cfg=self.arguments, workspace=None)
            )
        with member.log.open("a", encoding="utf-8") as log:
            log.write(f"{handle}\n{json.dumps(app.roles[0].args)}\n")
        return handle

    def _is_active(self, handle: str) -> bool:
        scheduler, _, rest = handle.partition("://")
        if scheduler == "slurm":
            # Not TorchX's status: that asks sacct, which needs an accounting database.
            job = rest.rpartition("/")[2]
            command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                # Slurm has forgotten the job, or cannot be reached: then the job may well run.
                return "Invalid job id" not in done.stderr
            return bool(done.stdout.strip())
        status = self.runner.status(handle)
        return status is not None and not status.is_terminal()
