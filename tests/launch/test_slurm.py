"""launch/slurm.sbatch under a real Slurm, whose two nodes are network namespaces.

Skipped, with the reason, where a machine has no Slurm (Debian: slurmctld, slurmd, slurm-client) or
allows no namespaces. tests/launch/test_forms.py has a stand-in for it.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.rotation.namespaces import ROOT, Nodes
from tests.launch.test_two_nodes import PATH, losses, network, on_one_rank, small

__all__ = ["network"]

CONFIG = """
ClusterName=lhcp
SlurmctldHost=node0({head})
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
SlurmdParameters=config_overrides
NodeName=node0 NodeAddr={head} CPUs=64
NodeName=node1 NodeAddr={other} CPUs=64
PartitionName=all Nodes=node[0-1] Default=YES
"""
STEPS = 40

Slurm = Callable[..., str]


def until(met: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.3)


@pytest.fixture
def slurm(network: Nodes, tmp_path: Path) -> Iterator[Slurm]:
    """A Slurm of two nodes; calls a program of it on the first, and returns what it printed."""
    steps = shutil.which("slurmstepd")
    if steps is None or shutil.which("slurmctld") is None:
        pytest.skip("there is no Slurm here: needs slurmctld and slurmd")
    (tmp_path / "slurm.conf").write_text(
        CONFIG.format(folder=tmp_path, head=network.address(0), other=network.address(1))
    )
    (tmp_path / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    hosts = [f"{network.address(node)} node{node}\n" for node in (0, 1)]
    env = os.environ | {"SLURM_CONF": f"{tmp_path}/slurm.conf", "PATH": PATH}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def on(node: int, *command: str) -> list[str]:
        # A node has a name of its own, which the others know; slurmd looks for control groups.
        own = f'hostname node{node}; mount -t tmpfs none /sys/fs/cgroup; exec "$0" "$@"'
        inside = ("ip", "netns", "exec", network.names[node], "unshare", "--uts")
        return [*inside, "sh", "-c", own, *command]

    def call(*command: str) -> str:
        done = subprocess.run(on(0, *command), env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    # What lies here takes the place of the machine's own inside a namespace.
    places = [Path("/etc/netns") / name for name in network.names]
    started = []
    try:
        for place in places:
            place.mkdir(parents=True)
            (place / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
        daemon = ("slurmd", "-D", "-d", steps)
        for node, command in ((0, ("slurmctld", "-D")), (0, daemon), (1, daemon)):
            with (tmp_path / f"{command[0]}{node}.txt").open("w") as log:
                started.append(
                    subprocess.Popen(on(node, *command), env=env, stdout=log, stderr=log)
                )
        until(lambda: call("sinfo", "-h", "-o", "%T") == "idle")
        yield call
    finally:
        for process in started:
            process.terminate()
        network.end_processes()
        for process in started:
            process.wait()
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_a_job_that_is_told_to_save_goes_on_when_submitted_again(
    slurm: Slurm, tmp_path: Path
) -> None:
    """Fails if torchrun on one node does not find the other, Slurm's signal does not reach the
    ranks, or the second job begins anew: its losses are one rank's."""
    # The nodes have no GPUs to ask Slurm for, nor to count.
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    for stands, becomes in (
        ("#SBATCH --gpus-per-node=8", ""),
        ("${SLURM_GPUS_ON_NODE:-8}", "2"),
    ):
        assert stands in script
        script = script.replace(stands, becomes)
    (tmp_path / "slurm.sbatch").write_text(script)
    run = (*small(STEPS), "--cp", "2", "--tp", "2", "--out", str(tmp_path / "two"))
    options = ("--nodes", "2", "--output", f"{tmp_path}/%j.log")

    def submit() -> tuple[str, Path]:
        job = slurm("sbatch", "--parsable", *options, str(tmp_path / "slurm.sbatch"), *run)
        return job, tmp_path / f"{job}.log"

    def ended(job: str) -> bool:
        return slurm("squeue", "-h", "-o", "%i").find(job) < 0

    job, log = submit()
    until(lambda: log.exists() and "lighthouse     1/" in log.read_text())
    slurm("scancel", "--signal=USR1", job)
    until(lambda: ended(job))
    assert "stopped by SIGUSR1 after step" in log.read_text(), log.read_text()[-3000:]
    assert not (tmp_path / "two" / "report.json").exists()
    job, log = submit()
    until(lambda: ended(job))
    said = log.read_text()
    assert "4 ranks on cpu, 1 x 2 x 2" in said and "lighthouse     1/" not in said
    found, expected = losses(tmp_path / "two"), on_one_rank(tmp_path / "one", STEPS)
    assert len(found) == 2 * STEPS and found == pytest.approx(expected, rel=1e-5)
