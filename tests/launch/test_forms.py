"""What the forms of launch/ start, by programs of the names they call, which say so."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder with a torchrun that prints its arguments, and Slurm's programs on two nodes."""
    for name, body in {
        "torchrun": 'printf "%s\\n" "$@"',
        "scontrol": '[ "$1 $2 $3" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"',
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift && exec "$@"',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return tmp_path


def started(stubs: Path, script: str, *arguments: str, **variables: str) -> list[str]:
    """Return what torchrun is given."""
    environment = {"PATH": f"{stubs}:{os.environ['PATH']}", **variables}
    done = subprocess.run(
        ["bash", script, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def assert_goes_on(words: list[str]) -> None:
    """Ranks that die are started again unasked, and hear what they are told to save by."""
    assert value(words, "--max-restarts") == "3"
    assert {"SIGTERM", "SIGUSR1"} <= {*value(words, "--signals-to-handle").split(",")}


def test_slurm_says_who_the_nodes_are(stubs: Path) -> None:
    """Fails if a node, the head's name or the job's number is not Slurm's, or nobody restarts."""
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
    }
    words = started(stubs, "launch/slurm.sbatch", "paper_98k", "--cp", "8", **slurm)
    assert (value(words, "--nnodes"), value(words, "--nproc-per-node")) == ("2", "4")
    assert value(words, "--rdzv-endpoint") == "gpu07:29400"
    assert (value(words, "--rdzv-backend"), value(words, "--rdzv-id")) == ("c10d", "4711")
    assert words[-6:] == ["-m", "lhcp", "train", "paper_98k", "--cp", "8"]
    assert "--local-addr" not in words
    assert_goes_on(words)


@pytest.mark.parametrize(
    ("local", "head", "place"),
    [
        ("", "localhost:29400", ["--local-addr", "localhost", "--rdzv-conf", "is_host=1"]),
        ("10.0.0.1", "10.0.0.1:1", ["--local-addr", "10.0.0.1", "--rdzv-conf", "is_host=1"]),
        ("10.0.0.2", "10.0.0.1:1", ["--local-addr", "10.0.0.2", "--rdzv-conf", "is_host=0"]),
        ("", "host0:29400", ["--nnodes", "2"]),
    ],
)
def test_one_machine_keeps_the_store(stubs: Path, local: str, head: str, place: list[str]) -> None:
    """Fails if two machines keep one, or none does where names are not of the cards meant."""
    nodes = {"NUM_NODES": "2", "HEAD_NODE": head, "LOCAL_ADDR": local}
    words = started(stubs, "launch/torchrun.sh", "doctor", "--seqlen", "512", **nodes)
    assert words[: len(place)] == place
    assert words[-4:] == ["lhcp", "doctor", "--seqlen", "512"]
    assert_goes_on(words)
