"""The launchers: they parse, use flags that exist, print what they would run, and run it with stand-ins."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci/run"]
# Beside the interpreter where pip installed it.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
ARGUMENTS = ["--config", "a folder/clip.py:tiny", "--workdir", "runs/$HOME;x"]
# Says what it got as one JSON line, then ends: with 7 if it is process $FAILS, with 75 after "saved" at
# SIGTERM, else with 0.
STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys, time
def saved(*_):
    os.write(1, b"saved" + bytes([10]))
    sys.exit(75)
signal.signal(signal.SIGTERM, saved)
keep = ("JAX_", "XLA_", "UNCLIP_")
env = {{k: v for k, v in os.environ.items() if k.startswith(keep)}}
line = json.dumps({{"argv": sys.argv[1:], "env": env}}) + chr(10)
os.write(1, line.encode())  # in one piece, so that lines of several processes stay whole
mine = os.environ.get("UNCLIP_PROCESS_ID", "0") == os.environ.get("FAILS", "")
time.sleep(float(os.environ.get("SLEEP_OF_FAILING" if mine else "SLEEP", "0")))
sys.exit(7 if mine else 0)
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def environment(tmp_path):
    """A clean environment in which `unclip` is the stand-in and tmp_path comes first on PATH."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "UNCLIP", "SLURM"))}
    unclip = executable(tmp_path / "unclip", STAND_IN)
    return keep | {"UNCLIP": str(unclip), "PATH": f"{tmp_path}:{keep['PATH']}"}


def launch(script: str, *arguments: str, env: dict) -> subprocess.CompletedProcess:
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def reports(text: str) -> dict[int, dict]:
    """What each stand-in said it got, by process number."""
    found = [json.loads(line[line.index("{") :]) for line in text.splitlines() if "{" in line]
    return {int(r["env"].get("UNCLIP_PROCESS_ID", 0)): r for r in found}


def help_of_train() -> str:
    command = [sys.executable, "-m", "unclip_jax.cli", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_are_executable(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert path.stat().st_mode & stat.S_IXUSR


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed (extra [dev])")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(path):
    done = subprocess.run([SHELLCHECK, "--shell=bash", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda p: p.name)
def test_headers_document_a_command_to_run(path):
    text = path.read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert len(header) > 10
    assert any(str(path.relative_to(ROOT)) in line for line in header)


def test_flags_of_train_exist():
    """Each `--flag` that a launcher or document gives to `unclip train` is one it knows."""
    known, used = help_of_train(), set()
    for path in [*LAUNCH.iterdir(), *(ROOT / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"unclip train (.+)", text):
            used |= set(re.findall(r"(?<!\S)--[a-z][a-z-]*", command))
    used |= {a for a in jobset_container()["command"] if a.startswith("--")}
    assert {"--config", "--workdir"} <= used
    assert not {flag for flag in used if not re.search(rf"{flag}\b", known)}


# local.sh


def test_local_alone_is_unclip_train(environment):
    dry = launch("local.sh", "--dry-run", *ARGUMENTS, env=environment)
    assert shlex.split(dry.stdout) == [environment["UNCLIP"], "train", *ARGUMENTS]
    run = launch("local.sh", *ARGUMENTS, env=environment)
    assert reports(run.stdout)[0]["argv"] == ["train", *ARGUMENTS]
    assert not [k for k in reports(run.stdout)[0]["env"] if k.startswith(("UNCLIP_", "JAX_", "XLA_"))]


def test_local_prints_one_command_for_each_process(environment):
    options = ["--processes", "3", "--devices", "4", "--port", "1234", "--dry-run"]
    dry = launch("local.sh", *options, *ARGUMENTS, env=environment)
    lines = dry.stdout.splitlines()
    assert len(lines) == 3
    for i, line in enumerate(lines):
        words = shlex.split(line)
        assert words[0] == "env" and words[-6:] == [environment["UNCLIP"], "train", *ARGUMENTS]
        assert dict(word.split("=", 1) for word in words[1:-6]) == {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "UNCLIP_COORDINATOR": "127.0.0.1:1234",
            "UNCLIP_PROCESSES": "3",
            "UNCLIP_PROCESS_ID": str(i),
        }


def test_local_runs_what_it_prints(environment):
    run = launch("local.sh", "--processes", "2", "--devices", "2", *ARGUMENTS, env=environment)
    assert run.returncode == 0, run.stderr
    found = reports(run.stdout)
    assert sorted(found) == [0, 1]
    assert all(r["argv"] == ["train", *ARGUMENTS] for r in found.values())
    assert len({r["env"]["UNCLIP_COORDINATOR"] for r in found.values()}) == 1
    assert any(line.startswith("[1] {") for line in run.stdout.splitlines())


@pytest.mark.multihost
def test_local_processes_meet_and_add_up_their_numbers(environment, tmp_path):
    """The package's own `distributed.initialize` and a sum over four devices of two processes."""
    script = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from unclip_jax import distributed
distributed.initialize()
import jax
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.numpy.float32(10 ** jax.process_index())).sum()
text = f"sum {{int(total)}} devices {{jax.local_device_count()}} of {{jax.device_count()}}"
sys.stdout.write(text + chr(10))
"""
    unclip = executable(tmp_path / "adds", script)
    options = ["--processes", "2", "--devices", "2"]
    run = launch("local.sh", *options, *ARGUMENTS, env=environment | {"UNCLIP": str(unclip)})
    assert run.returncode == 0, run.stderr + run.stdout
    assert run.stdout.count("sum 11 devices 2 of 4") == 2


def test_local_stops_the_others_when_one_fails(environment):
    slow = environment | {"FAILS": "1", "SLEEP": "50", "SLEEP_OF_FAILING": "1"}
    start = time.monotonic()
    run = launch("local.sh", "--processes", "3", *ARGUMENTS, env=slow)
    assert run.returncode == 7
    assert time.monotonic() - start < 20
    assert run.stdout.count("saved") == 2


def test_local_does_not_tell_of_a_stop_when_one_fails_after_it(environment, tmp_path):
    script = "#!/bin/bash\n[[ $UNCLIP_PROCESS_ID == 0 ]] && exit 75\nsleep 1; exit 134\n"
    unclip = executable(tmp_path / "saves", script)
    run = launch("local.sh", "--processes", "2", *ARGUMENTS, env=environment | {"UNCLIP": str(unclip)})
    assert run.returncode == 134


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_signal_to_every_process(environment, number):
    """To the whole process group, as a terminal's Ctrl-C comes; each process still says its last word."""
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "--processes", "3", *ARGUMENTS],
        env=environment | {"SLEEP": "50"},
        start_new_session=True,
        # as a terminal's children have it; those of a shell's background job are deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        text=True,
    )
    heard = [process.stdout.readline() for _ in range(3)]
    assert all('"argv"' in line for line in heard)
    os.kill(process.pid, number) if number == signal.SIGTERM else os.killpg(process.pid, number)
    rest = process.communicate(timeout=90)[0]
    assert rest.count("saved") == 3
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", [], "nothing to train"),
        ("local.sh", ["--processes", "0", *ARGUMENTS], "--processes needs a whole number above 0, not '0'"),
        ("local.sh", ["--devices"], "--devices needs a whole number above 0, not ''"),
        ("tpu_pod.sh", ["--zone", "z", *ARGUMENTS], "no TPU named"),
        ("tpu_pod.sh", ["--tpu", "--zone", "z"], "--tpu needs a value"),
        ("tpu_pod.sh", ["--tpu", "t", "--zone", "z"], "nothing to train"),
        ("tpu_pod.sh", ["--tpu", "t", "--zone", "z", "--stop", *ARGUMENTS], "takes no training arguments"),
        ("slurm.sbatch", ["--dry-run"], "nothing to train"),
    ],
)
def test_mistakes_are_told_in_one_line(environment, script, arguments, message):
    done = launch(script, *arguments, env=environment)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["local.sh", "tpu_pod.sh"])
def test_help_is_the_header(environment, script):
    done = launch(script, "--help", env=environment)
    assert done.returncode == 0
    assert "--dry-run" in done.stdout and "set -euo" not in done.stdout and "#" not in done.stdout[:2]


# tpu_pod.sh: a stand-in for gcloud runs each --command here, in tmp_path as if it were the host's home.

GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> calls
while (($#)); do
  if [[ $1 == --command ]]; then cd "$HOST" && sh -c "$2"; exit; fi
  shift
done
"""


@pytest.fixture
def host(tmp_path):
    executable(tmp_path / "gcloud", GCLOUD)
    folder = tmp_path / "home" / "unclip_jax" / ".venv" / "bin"
    folder.mkdir(parents=True)
    executable(folder / "unclip", STAND_IN)
    return tmp_path / "home"


def test_tpu_pod_runs_the_same_command_on_every_host(environment, host, tmp_path):
    where = ["--tpu", "pod", "--zone", "us-east5-a", "--project", "p"]
    env = environment | {"HOST": str(host)}
    command = ["bash", str(LAUNCH / "tpu_pod.sh"), *where, *ARGUMENTS]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    got = reports(run.stdout)[0]
    assert got["argv"] == ["train", *ARGUMENTS]  # quoted for two shells and still whole
    assert got["env"] == {"UNCLIP_COORDINATOR": "auto"}
    call = (tmp_path / "calls").read_text().split("\0")
    assert call[:5] == ["compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert "--worker=all" in call
    assert call[call.index("--zone") + 1] == "us-east5-a" and call[call.index("--project") + 1] == "p"


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("--setup", ["git -C", "scp", "pip install -q -e '.[tpu]'"]),
        ("--stop", ["pkill -TERM -x unclip"]),
    ],
)
def test_tpu_pod_dry_run_prints_the_commands(environment, host, tmp_path, action, expected):
    done = launch("tpu_pod.sh", "--tpu", "pod", "--zone", "z", action, "--dry-run", env=environment)
    printed = [" ".join(shlex.split(line)) for line in done.stdout.splitlines()]
    assert len(printed) == len(expected)
    assert all(text in line for text, line in zip(expected, printed, strict=True)), printed
    assert not (tmp_path / "calls").exists()


# slurm.sbatch: stand-ins for scontrol and srun.


def test_slurm_gives_every_task_its_number_and_all_gpus_of_its_node(environment, tmp_path):
    executable(tmp_path / "scontrol", "#!/bin/sh\necho node7\necho node8\n")
    srun = 'shift 2; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" || exit; done\n'
    executable(tmp_path / "srun", "#!/bin/sh\n" + srun)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123456", "SLURM_NTASKS": "2"}
    run = launch("slurm.sbatch", *ARGUMENTS, env=environment | job | {"SLURM_GPUS_ON_NODE": "4"})
    assert run.returncode == 0, run.stderr
    found = reports(run.stdout)
    assert sorted(found) == [0, 1]
    for r in found.values():
        assert r["argv"] == ["train", *ARGUMENTS]
        assert r["env"]["UNCLIP_COORDINATOR"] == "node7:23456"
        assert r["env"]["UNCLIP_PROCESSES"] == "2"
        assert r["env"]["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (2, False), (143, False)])
def test_slurm_puts_a_job_that_was_stopped_and_saved_back_into_the_queue(environment, tmp_path, code, requeued):
    executable(tmp_path / "scontrol", f'#!/bin/sh\necho node7\necho "$@" >> {tmp_path}/asked\n')
    executable(tmp_path / "srun", f"#!/bin/sh\nexit {code}\n")
    job = {"SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"}
    run = launch("slurm.sbatch", *ARGUMENTS, env=environment | job)
    assert run.returncode == code and not run.stderr
    assert ("requeue 123" in (tmp_path / "asked").read_text().splitlines()) == requeued


def test_slurm_takes_one_task_on_each_node(environment):
    """Several would each take all GPUs of their node."""
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16"}
    done = launch("slurm.sbatch", "--dry-run", *ARGUMENTS, env=environment | job)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: 16 tasks on 2 nodes") and "--ntasks-per-node=1" in done.stderr


def test_slurm_dry_run(environment):
    done = launch("slurm.sbatch", "--dry-run", *ARGUMENTS, env=environment)
    words = shlex.split(done.stdout)
    assert "srun" in words and words[-4:] == ARGUMENTS and "UNCLIP_PROCESSES=2" in words


# gke_jobset.yaml


def jobset_pod() -> dict:
    return jobset_job()["template"]["spec"]


def jobset_job() -> dict:
    return jobset()["replicatedJobs"][0]["template"]["spec"]


def jobset() -> dict:
    document = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text(encoding="utf-8"))
    assert document["kind"] == "JobSet"
    return document["spec"]


def jobset_container() -> dict:
    return jobset_pod()["containers"][0]


def test_jobset_has_one_pod_for_each_host_of_the_slice():
    job, container = jobset_job(), jobset_container()
    chips = 1
    for side in jobset_pod()["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == chips // per_host
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0


def test_jobset_starts_again_but_after_a_mistake():
    (rule,) = jobset_job()["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and codes["operator"] == "In" and codes["values"] == [2]
    assert codes["containerName"] == jobset_container()["name"]
    assert jobset_pod()["restartPolicy"] == "Never"  # or a Job may have no podFailurePolicy
    policy = jobset()["failurePolicy"]
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert policy["maxRestarts"] > 0


def test_jobset_has_memory_for_what_readers_hand_over():
    (mounted,) = [m["name"] for m in jobset_container()["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    (volume,) = [v for v in jobset_pod()["volumes"] if v["name"] == mounted]
    assert volume["emptyDir"] == {"medium": "Memory"}


def test_jobset_trains_into_the_shared_volume():
    container, pod = jobset_container(), jobset_pod()
    command = container["command"]
    assert command[:2] == ["unclip", "train"]
    assert {"name": "UNCLIP_COORDINATOR", "value": "auto"} in container["env"]
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert set(mounts) == {v["name"] for v in pod["volumes"]}
    assert command[command.index("--workdir") + 1].startswith(tuple(mounts.values()))


def test_configs_named_in_launchers_and_documents_exist():
    for path in [*LAUNCH.iterdir(), *(ROOT / "docs").glob("*.md")]:
        for name in set(re.findall(r"configs/(?!mine/)[a-z0-9_/]+\.py", path.read_text(encoding="utf-8"))):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


# .ci/run


@pytest.mark.parametrize(("lint", "tests", "code"), [(0, 0, 0), (1, 0, 1), (0, 2, 1)])
def test_ci_runs_all_and_fails_if_any_does(tmp_path, environment, lint, tests, code):
    stand_in = f"#!/bin/sh\necho $* >> {tmp_path}/ran\n[ $1 = lint ] && exit {lint}\nexit {tests}\n"
    executable(tmp_path / "make", stand_in)
    done = subprocess.run(["bash", str(ROOT / ".ci/run")], env=environment, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "ran").read_text().splitlines() == ["lint", "test", "test ARGS=-m slow --dist load"]
