"""A Slurm on this machine, from Debian's packages, as root and without systemd: for tests, never for work.

python tests/schedule/slurm_cluster.py      # starts it, submits an emitted plan, shows what its runs print
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool-%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd-%n.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd-%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
GresTypes=gpu
ReturnToService=2
MpiDefault=none
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN\n"


def missing() -> str | None:
    """Why Slurm cannot be started here, None if it can."""
    if os.geteuid() != 0:
        return "Slurm: only root can start its daemons"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    return f"Slurm: {', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)" if absent else None


@contextlib.contextmanager
def cluster(nodes: int = 1, gpus: int = 4):
    """Yields the environment in which Slurm's commands find the cluster, of nodes n0, n1, ... with `gpus` devices each;
    stops the daemons that it started."""
    run = Path(tempfile.mkdtemp(prefix="slurm"))
    run.chmod(0o755)
    children: list[subprocess.Popen] = []
    env = os.environ | {"SLURM_CONF": f"{run}/slurm.conf", "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    try:
        _munge(run, children, env)
        _configure(run, nodes, gpus)
        children.append(subprocess.Popen(["slurmctld", "-D"], env=env, **_quiet(run, "slurmctld.out")))
        for n in range(nodes):
            children.append(
                subprocess.Popen(["slurmd", "-D", "-N", f"n{n}"], env=env, **_quiet(run, f"slurmd-n{n}.out"))
            )
        _wait_idle(run, env, nodes)
        yield env
    finally:
        for child in reversed(children):
            child.terminate()
        for child in reversed(children):
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        shutil.rmtree(run, ignore_errors=True)


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _quiet(run: Path, name: str) -> dict:
    return {"stdin": subprocess.DEVNULL, "stdout": open(run / name, "w"), "stderr": subprocess.STDOUT}  # noqa: SIM115


def _munge(run: Path, children: list, env: dict) -> None:
    """munged runs as user munge, with a key and a socket of its own."""
    home = run / "munge"
    home.mkdir(mode=0o755)
    key = home / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(stat.S_IRUSR)
    for path in (home, key):
        shutil.chown(path, "munge", "munge")
    socket_path = run / "munge.socket"
    command = [
        "setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground",
        f"--key-file={key}", f"--socket={home}/socket", f"--pid-file={home}/pid", f"--log-file={home}/log",
        f"--seed-file={home}/seed",
    ]  # fmt: skip
    children.append(subprocess.Popen(command, env=env, **_quiet(run, "munged.out")))
    _until(lambda: (home / "socket").exists(), 10, "munged made no socket", run / "munged.out")
    socket_path.symlink_to(home / "socket")


def _configure(run: Path, nodes: int, gpus: int) -> None:
    for name in ("state", *(f"spool-n{n}" for n in range(nodes)), "devices"):
        (run / name).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"host": _host(), "cpus": os.cpu_count(), "gpus": gpus}
    lines = [_NODE.format(n=n, port=port + 1 + n, **common) for n in range(nodes)]
    (run / "slurm.conf").write_text(_CONF.format(run=run, port=port, **common) + "".join(lines))
    # With Count alone the node goes INVAL: each device needs a file, and any character device will do.
    devices = [run / "devices" / f"gpu{index}" for index in range(gpus)]
    for device in devices:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (run / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
    (run / "cgroup.conf").write_text("CgroupAutomount=no\n")


def _wait_idle(run: Path, env: dict, nodes: int) -> None:
    def idle() -> bool:
        shown = subprocess.run(["scontrol", "show", "nodes"], env=env, capture_output=True, text=True).stdout
        return shown.count("State=IDLE") == nodes and "INVAL" not in shown

    logs = [run / "slurmctld.log", *(run / f"slurmd-n{n}.log" for n in range(nodes))]
    _until(idle, 30, "the nodes did not come up", *logs)


def _until(done, seconds: float, what: str, *logs: Path) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            tail = "\n".join(path.read_text()[-1500:] for path in logs if path.exists())
            raise RuntimeError(f"Slurm: {what}\n{tail}")
        time.sleep(0.1)


def wait_empty(env: dict, seconds: float) -> None:
    """Until the queue is empty."""

    def empty() -> bool:
        shown = subprocess.run(["squeue", "--noheader"], env=env, capture_output=True, text=True)
        return shown.returncode == 0 and not shown.stdout.strip()

    _until(empty, seconds, "the queue did not empty")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import test_slurm

    print(missing() or "starting")
    with tempfile.TemporaryDirectory() as folder:
        print(test_slurm.run_plan(test_slurm.small_plan(), Path(folder)))
