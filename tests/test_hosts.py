"""Processes find each other by flags and by a cluster's variables, and say clearly where they cannot."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from tiny import tiny, tiny_dataset

from mammodino_jax import checkpoint, hosts, metrics, workdir
from mammodino_jax.data import records
from mammodino_jax.errors import UserError

REPO = Path(__file__).resolve().parents[1]
CLUSTERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR", "JAX_LOCAL")
SAY = (
    "import sys\nfrom mammodino_jax.hosts import connect\nfrom mammodino_jax.errors import UserError\n"
    "a = eval(sys.argv[1])\n"
    "try:\n    connect(*a)\nexcept UserError as error:\n    sys.exit(f'error: {error}')\n"
    "import jax\nprint(jax.process_index(), jax.process_count(), jax.config.read('jax_cuda_visible_devices'))"
)


def clean() -> dict:
    """The environment without any cluster, one CPU device."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTERS)}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(*arguments, **env) -> subprocess.Popen:
    command = [sys.executable, "-c", SAY, repr(arguments)]
    return subprocess.Popen(
        command, env=clean() | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", None, None), "--coordinator without --processes and --process"),
        ((None, 2, 0), "--processes, --process without --coordinator"),
        ((None, None, 0), "--process without --coordinator and --processes"),
        ((None, 1, 1), "--processes, --process without --coordinator"),
        (("host", 2, 0), "'host', expected HOST:PORT"),
        ((":80", 2, 0), "':80', expected HOST:PORT"),
        (("h:1", 2, 2), "--process is 2, expected 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_are_named(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        hosts.connect(*given)


def alone(before: str, env: dict) -> subprocess.CompletedProcess:
    """connect() in a process that has touched no device yet."""
    code = (
        f"from mammodino_jax import hosts\n{before}\nhosts.connect(processes=1)\nhosts.connect()\n"
        "import jax\nassert not jax.distributed.is_initialized() and jax.device_count()"
    )
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_one_process_needs_neither_flags_nor_network():
    """No socket is opened: neither by JAX, whose service would need one, nor for detection."""
    refuse = "import socket\ndef refuse(*_, **__):\n    raise AssertionError('network')"
    done = alone(f"{refuse}\nsocket.socket = socket.gethostbyname = refuse", clean())
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_pod_of_an_indexed_job_does_not_train_alone():
    done = alone("", clean() | {"JOB_COMPLETION_INDEX": "3"})
    assert done.returncode == 1 and "UserError: this is pod JOB_COMPLETION_INDEX=3" in done.stderr


def slurm(task: int, tasks: int, nodes: int = 1, **env) -> dict:
    """What srun sets for a task; Slurm itself was not at hand."""
    values = {
        "SLURM_JOB_ID": str(free_port() % 4000), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_STEP_NUM_NODES": str(nodes),
    }  # fmt: skip
    return values | env


@pytest.mark.slow
def test_slurm_tasks_meet_and_take_the_right_gpus():
    """A task that has its node for itself sees all GPUs; JAX alone would take the first. Two share them."""
    alone = start(**slurm(0, 1, CUDA_VISIBLE_DEVICES="0,1,2,3"))
    two = [slurm(t, 2, CUDA_VISIBLE_DEVICES="0,1") for t in (0, 1)]
    bound = [slurm(t, 2, CUDA_VISIBLE_DEVICES="0") for t in (0, 1)]  # --gpus-per-task=1
    said = [alone.communicate(timeout=60)]
    for pair in (two, bound):
        job = pair[0]["SLURM_JOB_ID"]
        both = [start(**env | {"SLURM_JOB_ID": job}) for env in pair]
        said += [p.communicate(timeout=60) for p in both]
    assert [out.strip() for out, _ in said] == ["0 1 all", "0 2 0", "1 2 1", "0 2 all", "1 2 all"], said


@pytest.mark.slow
def test_processes_that_do_not_meet_say_so_and_exit():
    port = free_port()
    first = start(f"localhost:{port}", 2, 0, 4)  # the other never comes
    other = start(f"localhost:{free_port()}", 2, 1, 4)  # nobody listens
    began = time.time()
    for process in (first, other):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and "did not meet at localhost" in err and "within 4 s" in err
        assert len(err.strip().splitlines()) == 1, err
    assert time.time() - began < 30


def test_a_cluster_that_cannot_be_joined_is_one_error():
    """Half a cluster in the environment: JAX knows the address but not how many there are."""
    done = start(JAX_COORDINATOR_ADDRESS="localhost:1")
    _, err = done.communicate(timeout=60)
    assert "cannot join the cluster JAX detected: ValueError Number of processes must be defined" in err
    assert len(err.strip().splitlines()) == 1 and "--processes=1 to train alone" in err


def recipe_file(folder: Path, config) -> Path:
    path = folder / "recipe.py"
    path.write_text(
        f"import json\nfrom ml_collections import ConfigDict\nVALUES = json.loads('''{json.dumps(config.to_dict())}''')\n\n"
        "def get_config():\n    return ConfigDict(VALUES)\n"
    )
    return path


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on(tmp_path):
    """main.py by its flags: files are written once, and one process with one device resumes the run."""
    c = tiny(tiny_dataset(tmp_path / "data"), steps=4, batch_size=16, dbt_rows=8)
    c.run.checkpoint_every, c.fsdp = 2, 1
    config, workdir = recipe_file(tmp_path, c), tmp_path / "run"
    command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}"]

    def main(*flags, **env):
        return subprocess.Popen(
            [*command, *flags], cwd=REPO, env=clean() | env, stderr=subprocess.PIPE, text=True
        )

    meet = f"--coordinator=localhost:{free_port()}"
    both = [main(meet, "--processes=2", f"--process={p}", JAX_NUM_CPU_DEVICES="4") for p in (0, 1)]
    first, second = (process.communicate(timeout=500)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], (first[-2000:], second[-2000:])
    assert "2 processes, devices" in first and "step 3/4" in first
    assert not [line for line in second.splitlines() if line[:1] in "IWEF" and "mammodino_jax" in line], (
        second
    )
    two = metrics.read(workdir / "metrics.jsonl")
    assert [row["step"] for row in two] == [0, 1, 2, 3] and "held_out/rank" in two[0]
    assert len(list(workdir.glob("events.*"))) == 1
    assert {p.name for p in (workdir / "samples").iterdir()} == {"crops.png", "pairs.png"}
    assert checkpoint.steps(workdir / "checkpoints") == [2, 4] and not list(workdir.glob("*.tmp"))
    shutil.rmtree(workdir / "checkpoints" / "4")
    alone = main()
    err = alone.communicate(timeout=500)[1]
    assert alone.returncode == 0, err[-2000:]
    one = metrics.read(workdir / "metrics.jsonl")
    assert [row["step"] for row in one] == [0, 1, 2, 3] and one[:2] == two[:2]
    for a, b in zip(one[2:], two[2:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["bad"] == 0


@pytest.mark.slow
def test_a_process_that_fails_returns_its_code_and_the_others_notice(tmp_path):
    """Each process reads a copy of the data of its own: a record of one's is damaged, or of both's."""
    c = tiny(tiny_dataset(tmp_path / "data"), steps=100, batch_size=16, dbt_rows=8)
    c.data.sources = (("data", "train", ("2d", "dbt"), 1.0),)  # below each process's folder
    config = recipe_file(tmp_path, c)
    runs = {}
    for failing in ((0,), (1,), (0, 1)):
        meet, both = f"--coordinator=localhost:{free_port()}", []
        for p in (0, 1):
            folder = tmp_path / f"{failing}{p}"
            shutil.copytree(tmp_path / "data", folder / "data")
            for shard in records.shard_paths(folder / "data", "train") if p in failing else ():
                content = bytearray(Path(shard).read_bytes())
                at = len(content) // 4
                content[at : at + 64] = bytes(64)  # one record
                Path(shard).write_bytes(content)
            command = [
                sys.executable,
                REPO / "main.py",
                f"--config={config}",
                f"--workdir={tmp_path / str(failing)}",
            ]
            both.append(
                subprocess.Popen(
                    [*command, meet, "--processes=2", f"--process={p}"],
                    cwd=folder, env=clean(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        runs[failing] = both
    began = time.time()
    for failing, both in runs.items():
        for p, process in enumerate(both):
            err = process.communicate(timeout=300)[1]
            if p in failing:
                assert process.returncode == 2 and "cannot be read" in err, err[-2000:]
            else:  # a collective fails, or JAX aborts when it learns that the other is gone
                assert process.returncode in (1, -6), (process.returncode, err[-2000:])
    assert time.time() - began < 150


def test_a_workdir_that_hosts_do_not_share_is_refused(tmp_path, monkeypatch):
    """What process 1 does where it cannot see process 0's file, or sees another config in it."""
    c = tiny("data")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(workdir, "SHARED_SECONDS", 0)
    with pytest.raises(UserError, match="process 1 does not see what process 0 wrote"):
        workdir.claim_workdir(c, tmp_path)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    workdir.claim_workdir(c, tmp_path)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    workdir.claim_workdir(c, tmp_path)
    c.seed = 5
    with pytest.raises(UserError, match="belongs to another config: seed is 0 there and 5 here"):
        workdir.claim_workdir(c, tmp_path)


def test_the_exit_code_holds_where_the_console_is_on_a_full_disk():
    code = "from mammodino_jax.hosts import leave\nleave('error: no room', 2)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], env=clean(), stderr=full)
    assert done.returncode == 2
