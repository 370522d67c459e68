"""A private Slurm of virtual nodes on this machine: munged, slurmctld and one slurmd a node, as root.

Everything it writes lies below one folder. Each node has its own host name, processes, /dev/shm and mounts, so that
killing its process 1 is what a crash is. Users' scripts run on it as they would on a cluster.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "setpriv")
NODES = 4
LIMIT_SECONDS = 1800
"""Far above what any job takes, also on a machine busy with others: only a hang reaches it."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

CONFIGURATION = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=10
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
FirstJobId={first_job}
{nodes}
PartitionName=all Nodes=tn[1-{count}] Default=YES State=UP MaxTime=1440 DefaultTime=60
"""

# Arguments: the node's name, the folder.
NODE = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs shm /dev/shm
exec slurmd -D -f "$2/slurm.conf" -N "$1"
"""


def why_not() -> str | None:
    """Why no cluster can be made here, None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "only root can make virtual nodes"
    if subprocess.run(
        ["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        return "this machine lets nobody make namespaces"
    return None


class Cluster:
    """Started by `start`, ended by `stop`. `folder` must be short: sockets lie in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._munge: subprocess.Popen[bytes] | None = None
        self._controller: subprocess.Popen[bytes] | None = None
        self.first_job = int(time.time()) % 60_000_000 + 1  # so that no older job's output has its number
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "PMI", "OMPI"))},
            "PATH": _path(),
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self) -> None:
        port = _free_port()
        host = socket.gethostname().split(".")[0]
        names = [f"tn{number}" for number in range(1, NODES + 1)]
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.1.{i} Port={_free_port()} CPUs=16 RealMemory=8192"
            " Gres=gpu:2 State=UNKNOWN"
            for i, name in enumerate(names, start=1)
        ]
        (self.folder / "state").mkdir(parents=True)
        configuration = CONFIGURATION.format(
            host=host,
            port=port,
            folder=self.folder,
            nodes="\n".join(lines),
            count=NODES,
            first_job=self.first_job,
        )
        (self.folder / "slurm.conf").write_text(configuration)
        addresses = [f"127.0.1.{i} {name}" for i, name in enumerate(names, start=1)]
        (self.folder / "hosts").write_text("\n".join([f"127.0.0.1 localhost {host}", *addresses]) + "\n")
        for number in (0, 1):  # a GPU must be a device; /dev/null's serves
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-1]\n")
        self._start_munge()
        self._controller = self._spawn(["slurmctld", "-D", "-c", "-f", self.environ["SLURM_CONF"]])
        for name in names:
            self.start_node(name)
        deadline = time.monotonic() + 120
        while self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split() != ["idle"] * NODES:
            if time.monotonic() > deadline:
                self.stop()
                logs = "\n".join(
                    path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")
                )
                raise RuntimeError(f"the virtual nodes did not become idle\n{logs}")
            time.sleep(0.1)

    def stop(self) -> None:
        if self._controller is not None:
            self.cancel_all()
        for name in list(self._nodes):
            self.kill_node(name)
        for process in (self._controller, self._munge):
            if process is not None:
                process.terminate()
                process.wait(20)
        for path in REPOSITORY.glob("logs/*.out"):
            number = re.search(r"-(\d+)(_\d+)?\.out$", path.name)
            if number and self.first_job <= int(number[1]) < self.first_job + 1000:
                path.unlink()

    def cancel_all(self) -> None:
        self.run("scancel", "--quiet", "--user=root", check=False)

    def start_node(self, name: str) -> None:
        namespaces = ["--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["unshare", *namespaces, "--propagation", "private", "bash", "-euc", NODE, "-", name]
        self._nodes[name] = self._spawn([*command, str(self.folder)])

    def kill_node(self, name: str) -> None:
        """What a power cut does: every process of the node is gone at once."""
        node = self._nodes.pop(name)
        os.kill(
            node.pid, signal.SIGKILL
        )  # with unshare dies its child, process 1 of the node, and so all others
        node.wait()

    def run(self, *command: str, cwd: Path = REPOSITORY, check: bool = True, **environment: str) -> str:
        """What a command prints."""
        finished = subprocess.run(
            command, cwd=cwd, env={**self.environ, **environment}, capture_output=True, text=True, timeout=120
        )
        assert not check or finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
        return finished.stdout

    def submit(self, *arguments: str, environment: Mapping[str, str] | None = None) -> int:
        """`sbatch ARGUMENTS` in the repository's folder; the job's number."""
        answer = self.run("sbatch", "--parsable", *arguments, **(environment or {}))
        return int(answer.split(";")[0])

    def state(self, job: int) -> str:
        """The job's state; of an array COMPLETED only if all its tasks are."""
        states = set(self.run("squeue", "-h", "-t", "all", "-j", str(job), "-o", "%T").split())
        return states.pop() if len(states) == 1 else next(iter(sorted(states - {"COMPLETED"})), "")

    def wait(self, job: int, *states: str, seconds: float = LIMIT_SECONDS) -> str:
        """Waits until the job is in one of the states (by default: has ended) and returns it."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in (states or ENDED):
            assert time.monotonic() < deadline, (
                f"job {job} is {state} after {seconds:g} s\n{self.output(job)}"
            )
            time.sleep(0.1)
        return state

    def wait_for_text(self, job: int, text: str, *, count: int = 1, seconds: float = LIMIT_SECONDS) -> None:
        """Waits until the job's output has a text."""
        deadline = time.monotonic() + seconds
        while self.output(job).count(text) < count:
            assert time.monotonic() < deadline, f"no {text!r} from job {job}\n{self.output(job)}"
            assert self.state(job) not in ENDED, self.output(job)
            time.sleep(0.1)

    def output(self, job: int) -> str:
        paths = [*REPOSITORY.glob(f"logs/*-{job}.out"), *REPOSITORY.glob(f"logs/*-{job}_*.out")]
        return "".join(path.read_text(errors="replace") for path in sorted(paths))

    def field(self, job: int, name: str) -> str:
        words = self.run("scontrol", "-o", "show", "job", str(job)).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def _start_munge(self) -> None:
        keys = self.folder / "keys"
        keys.mkdir(mode=0o700)
        key = keys / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": keys / "pid",
            "log-file": keys / "log",
            "seed-file": keys / "seed",
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        self._munge = self._spawn(["munged", "--foreground", "--force", *options])
        deadline = time.monotonic() + 120
        while not (self.folder / "munge.socket").exists():
            assert time.monotonic() < deadline, "munged does not start"
            time.sleep(0.05)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        # They end with this process, however it ends.
        with (self.folder / "daemons.log").open("ab") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def _path() -> str:
    """With this Python first, which the jobs take over as an active venv's, and the daemons' folders."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
