"""A Slurm cluster of two nodes on this machine, from Debian's packages, for as long as a block runs.

Needs munged, slurmctld, slurmd, slurmdbd and MariaDB (apt-get install slurm-wlm munge slurmdbd mariadb-server), no systemd, no
cgroups. Everything lies in one folder and listens on the loopback interface; it is ended by its process numbers.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NEEDED = ("munged", "munge", "slurmctld", "slurmd", "slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db", "mariadb")
NODES = ("n1", "n2")
CPUS, MEMORY = 3, 6000  # of a node, which need not exist, and MB

SLURM = """
ClusterName=svnup
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={munge}
SlurmctldPort={ctld}
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=sched_interval=1,batch_sched_delay=1,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={munge}
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
DBD = """
AuthType=auth/munge
AuthInfo=socket={munge}
DbdHost=localhost
DbdPort={dbd}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct
"""


def missing() -> list[str]:
    """What of it is not installed."""
    return [name for name in NEEDED if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment in which commands find the cluster; its daemons are stopped when the block ends."""
    user, password = pwd.getpwuid(os.getuid()).pw_name, secrets.token_hex(8)
    folder.mkdir(parents=True)
    names = {"folder": folder, "user": user, "password": password, "host": socket.gethostname().split(".")[0]}
    names |= {
        "munge": folder / "munge.socket",
        **dict(zip(("ctld", "dbd", "sql", *NODES), _ports(3 + len(NODES)), strict=True)),
    }
    nodes = [f"NodeName={n} NodeHostname={names['host']} NodeAddr=127.0.0.1 Port={names[n]}" for n in NODES]
    nodes = [f"{line} CPUs={CPUS} RealMemory={MEMORY} State=UNKNOWN" for line in nodes]
    (folder / "slurm.conf").write_text(SLURM.format(**names, nodes="\n".join(nodes), names=",".join(NODES)))
    (folder / "slurmdbd.conf").write_text(DBD.format(**names))
    (folder / "slurmdbd.conf").chmod(0o600)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(64))
    (folder / "munge.key").chmod(0o600)
    env = os.environ | {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    started: list[subprocess.Popen[bytes]] = []
    said = [""]

    def start(*command: object) -> None:
        log = (folder / "daemons.log").open("ab")
        started.append(subprocess.Popen([str(c) for c in command], env=env, stdout=log, stderr=log, cwd=folder))

    def ask(*command: object) -> bool:
        done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True, check=False, timeout=60)
        said[0] = done.stderr.strip()
        return done.returncode == 0

    def until(what: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not ready():
            if time.monotonic() > end:
                raise RuntimeError(f"{what} did not come up: {said[0]}; the logs are in {folder}")
            time.sleep(0.3)

    sql = ["mariadb", "--no-defaults", f"--socket={folder / 'sql.socket'}", f"--user={user}"]
    try:
        own = [f"--{what}-file={folder / 'munge'}.{what}" for what in ("pid", "log", "seed")]
        start("munged", "--foreground", "--force", f"--socket={names['munge']}", f"--key-file={folder / 'munge.key'}", *own)
        until("munged", lambda: ask("munge", "-n", "-S", names["munge"]))
        made = ask(
            *("mariadb-install-db", "--no-defaults", f"--user={user}", f"--datadir={folder / 'sql'}"),
            *("--auth-root-authentication-method=normal", "--skip-test-db"),
        )
        assert made, "no data base could be made"
        start(
            *(
                "mariadbd",
                "--no-defaults",
                f"--user={user}",
                f"--datadir={folder / 'sql'}",
                f"--socket={folder / 'sql.socket'}",
            ),
            *(
                f"--port={names['sql']}",
                "--bind-address=127.0.0.1",
                "--innodb-log-file-size=16M",
                "--innodb-lock-wait-timeout=900",
            ),
        )
        until("mariadbd", lambda: ask(*sql, "-e", "select 1"))
        given = f"create user slurm@'127.0.0.1' identified by '{password}'; grant all on slurm_acct.* to slurm@'127.0.0.1';"
        assert ask(*sql, "-e", f"create database slurm_acct; {given}")
        start("slurmdbd", "-D")
        until("slurmdbd", lambda: ask("sacctmgr", "-n", "show", "cluster"))
        ask("sacctmgr", "-i", "add", "cluster", "svnup")
        start("slurmctld", "-D", "-i", "-f", env["SLURM_CONF"])
        until("slurmctld", lambda: ask("scontrol", "ping"))
        for node in NODES:
            (folder / f"spool.{node}").mkdir()
            start("slurmd", "-D", "-N", node, "-f", env["SLURM_CONF"])
        until("the nodes", lambda: _idle(env) == len(NODES))
        yield env
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle(env: dict[str, str]) -> int:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=env, capture_output=True, text=True, check=False)
    return done.stdout.split().count("idle")


def _ports(n: int) -> list[int]:
    """Free ports of this machine."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
