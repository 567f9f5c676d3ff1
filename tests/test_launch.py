"""The launch scripts, with stand-ins for gcloud, sbatch, srun and python that record what they get.

Nothing of a provider is called: the PATH has the stand-ins first.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("local_cluster.sh", "slurm.sh", "tpu_pod.sh")

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")

# What a user may write and a shell would take apart.
AWKWARD = ("--config=configs/my own.py", "--config.data.root=/a b/$HOME/it's", '--config.x=("a",*)')
WORKDIR = "--workdir=gs://bucket/my run"

# Records its name and arguments, each ended by NUL and led by their count; then does what the test
# has written for it.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\0' "$(($# + 1))" "${0##*/}" "$@" >>"$STAND_INS/record"
if [[ -e $STAND_INS/${0##*/}.does ]]; then source "$STAND_INS/${0##*/}.does"; fi
"""


# What ignores signals, as nohup and background jobs do, has its children ignore them too. Not by
# preexec_fn, which forks a process that has JAX's threads.
HEAR_SIGNALS = ("env", "--default-signal=INT,HUP")


class StandIns:
    """A copy of the launch scripts in a folder with a space, and programs that only record."""

    def __init__(self, folder, *names):
        self.project = folder / "my project"
        shutil.copytree(ROOT / "launch", self.project / "launch")
        self.folder = folder / "stand-ins"
        self.folder.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        self.environment = kept | {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "STAND_INS": str(self.folder),
            "HOME": str(folder),
            "TMPDIR": str(folder),
        }
        for name in names:
            self.add(name)

    def add(self, name, does=""):
        """Puts a program on the PATH, which also does what the bash lines say."""
        path = self.folder / name
        path.write_text(STAND_IN)
        path.chmod(0o755)
        if does:
            (self.folder / f"{name}.does").write_text(does)

    def start(self, script, *arguments, **options):
        return subprocess.Popen(
            [*HEAR_SIGNALS, "bash", self.project / "launch" / script, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, script, *arguments, status=0):
        """What the script prints; it must end with the status."""
        process = self.start(script, *arguments)
        try:
            output, errors = process.communicate(timeout=100)
        finally:
            process.terminate()
        assert process.returncode == status, errors
        return output, errors

    def paste(self, lines):
        subprocess.run(["bash", "-ec", lines], env=self.environment, check=True, timeout=60)

    def recorded(self):
        """The calls since the last look, each a list of its name and arguments."""
        record = self.folder / "record"
        words = record.read_text().split("\0")[:-1] if record.exists() else []
        record.unlink(missing_ok=True)
        calls = []
        while words:
            count = int(words.pop(0))
            calls.append(words[:count])
            del words[:count]
        return calls


# Usage


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_the_usage(tmp_path, script):
    output, _ = StandIns(tmp_path).run(script, "--help")
    assert output.startswith(f"launch/{script} ")
    assert "--dry-run" in output and "set -euo" not in output


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("local_cluster.sh", (), "N is ''"),
        ("local_cluster.sh", ("2",), "Say what to run"),
        ("local_cluster.sh", ("0", "--", "--config=x"), "N is '0'"),
        ("local_cluster.sh", ("2", "3", "--", "--config=x"), "3 is one argument too many"),
        ("local_cluster.sh", ("2", "--config=x"), "--config=x is not an option here"),
        ("slurm.sh", ("--nodes=2", "--time=1:00", "--", "x"), "--gpus-per-node is ''"),
        ("slurm.sh", ("--nodes=2", "--gpus-per-node=4", "--", "x"), "Give the time limit"),
        ("tpu_pod.sh", (), "'' is not a command"),
        ("tpu_pod.sh", ("copy",), "Give the TPU a name"),
        ("tpu_pod.sh", ("copy", "pod"), "Give its zone"),
        ("tpu_pod.sh", ("create", "pod", "--zone=z"), "Give the TPU's type"),
        (
            "tpu_pod.sh",
            ("create", "pod", "--zone=z", "--accelerator-type=v9-8"),
            "--runtime-version=",
        ),
        ("tpu_pod.sh", ("data", "pod", "--zone=z", "--data=/disk"), "--data is '/disk'"),
        ("tpu_pod.sh", ("run", "pod", "--zone=z", "--", "--workdir=runs/x"), "--workdir=gs://"),
    ],
)
def test_a_wrong_command_ends_with_the_usage_and_a_sentence(tmp_path, script, arguments, sentence):
    stand_ins = StandIns(tmp_path, "gcloud", "sbatch")
    output, errors = stand_ins.run(script, *arguments, status=2)
    assert not output and errors.startswith(f"launch/{script} ")
    last = errors.strip().splitlines()[-1]
    assert last.startswith("Error: ") and sentence in last
    assert not stand_ins.recorded()


# TPU pods: the commands

POD = ("pod", "--zone=us-west4-a", "--project=mine")
PLACE = ["--zone=us-west4-a", "--project=mine"]
TYPE = ("--accelerator-type=v5litepod-16", "--spot", "--create-flag=--network=my net")
WORKER = "bash semiseg/project/launch/tpu_worker.sh"
LIST_TPUS = ["tpu-vm", "list", *PLACE, "--format=value(name.basename(),state)"]
LIST_REQUESTS = ["queued-resources", "list", *PLACE, "--format=value(name.basename(),state.state)"]
QUEUE = [
    *("queued-resources", "create", "pod", *PLACE, "--node-id=pod"),
    *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    "--network=my net",
]
DELETE = [
    LIST_REQUESTS,
    ["queued-resources", "delete", "pod", *PLACE, "--force", "--quiet"],
    LIST_TPUS,
    ["tpu-vm", "delete", "pod", *PLACE, "--quiet"],
]


def ssh(command, worker="all", *flags):
    where = ["tpu-vm", "ssh", "pod", *PLACE, f"--worker={worker}", "--quiet"]
    return [*where, *flags, f"--command={command}"]


STATUS = ssh(
    "if [ -e semiseg/project/launch/tpu_worker.sh ]; then "
    "bash semiseg/project/launch/tpu_worker.sh status; else echo semiseg - none; fi"
)
RUN = ssh(
    f"{WORKER} run '--config=configs/my own.py' '--config.data.root=/a b/$HOME/it'\\''s' "
    """'--config.x=("a",*)' '--workdir=gs://bucket/my run'"""
)
SETUP = ssh(f"{WORKER} setup")


def copy(folder):
    """The commands that copy the project, from a folder of temporary files."""
    archive = f"{folder}/semiseg_jax-pod.tar.gz"
    left_out = ("./.git", "./.venv*", "./.*_cache", "./data", "./runs", "__pycache__")
    pack = ["tar", "-czf", archive, "-C", f"{folder}/my project"]
    unpack = (
        "rm -rf semiseg/project && mkdir -p semiseg/project semiseg/data && "
        "tar -xzf semiseg_jax.tar.gz -C semiseg/project && rm semiseg_jax.tar.gz && "
        "ln -s ../data semiseg/project/data"
    )
    send = ["tpu-vm", "scp", archive, "pod:semiseg_jax.tar.gz", *PLACE, "--worker=all", "--quiet"]
    return [[*pack, *(f"--exclude={e}" for e in left_out), "."], send, ["rm", archive], ssh(unpack)]


# Task, its arguments, the commands; in these, tpu-vm and queued-resources are gcloud's.
TASKS = {
    "create": (
        TYPE,
        [
            [
                *("tpu-vm", "create", "pod", *PLACE, "--accelerator-type=v5litepod-16"),
                *("--version=v2-alpha-tpuv5-lite", "--spot", "--network=my net"),
            ]
        ],
    ),
    "queue": (TYPE, [QUEUE]),
    "copy": ((), copy),
    "setup": (("--ssh-flag=--internal-ip",), [ssh(f"{WORKER} setup", "all", "--internal-ip")]),
    "data": (("--data=gs://bucket/my data",), [ssh(f"{WORKER} data 'gs://bucket/my data'")]),
    "run": (("--", *AWKWARD, WORKDIR), [RUN]),
    "logs": (
        ("--worker=3", "--follow"),
        [ssh("tail -n 100 -F semiseg/run.log", "3")],
    ),
    "status": ((), [LIST_REQUESTS, LIST_TPUS, STATUS]),
    "stop": ((), [ssh(f"{WORKER} stop")]),
    "delete": ((), DELETE),
}


def full(calls):
    """The calls with gcloud's part that all share."""
    ours = ("tpu-vm", "queued-resources")
    return [["gcloud", "compute", "tpus", *c] if c[0] in ours else c for c in calls]


# A TPU that is ready, and the request that it came by.
THERE = """case $* in
  *"queued-resources list"*) printf 'other\\tFAILED\\npod\\tACTIVE\\n' ;;
  *"tpu-vm list"*) printf 'other\\tCREATING\\npod\\tREADY\\n' ;;
esac
"""


@pytest.mark.parametrize("task", TASKS)
def test_pod_commands(tmp_path, task):
    arguments, expected = TASKS[task]
    stand_ins = StandIns(tmp_path, "tar", "rm")
    stand_ins.add("gcloud", THERE)
    stand_ins.run("tpu_pod.sh", task, *POD, *arguments)
    expected = expected(tmp_path) if callable(expected) else expected
    assert stand_ins.recorded() == full(expected)


@pytest.mark.parametrize("task", TASKS)
def test_a_dry_run_prints_what_runs_and_runs_nothing(tmp_path, task):
    arguments, expected = TASKS[task]
    stand_ins = StandIns(tmp_path, "tar", "rm")
    stand_ins.add("gcloud", THERE)
    lines, _ = stand_ins.run("tpu_pod.sh", task, *POD, "--dry-run", *arguments)
    assert not stand_ins.recorded()
    stand_ins.paste(lines)
    expected = expected(tmp_path) if callable(expected) else expected
    assert stand_ins.recorded() == full(expected)


def test_delete_where_there_is_nothing(tmp_path):
    stand_ins = StandIns(tmp_path, "gcloud")
    stand_ins.run("tpu_pod.sh", "delete", *POD)
    assert stand_ins.recorded() == full([LIST_REQUESTS, LIST_TPUS])


def test_an_unknown_state_is_no_absence(tmp_path):
    stand_ins = StandIns(tmp_path)
    stand_ins.add("gcloud", "echo 'not logged in' >&2; exit 1")
    _, errors = stand_ins.run("tpu_pod.sh", "delete", *POD, status=1)
    assert "not logged in" in errors
    assert len(stand_ins.recorded()) == 1


# TPU pods: train


def answering(*statuses):
    """A gcloud whose TPU comes by a request, and whose workers give these answers in turn."""
    return (
        f"""
state() {{ if [[ -e $STAND_INS/$1 ]]; then cat "$STAND_INS/$1"; fi; }}
statuses=({" ".join(f"'{s}'" for s in statuses)})
"""
        + """
case $* in
  *"queued-resources list"*) state request ;;
  *"tpu-vm list"*) state tpu ;;
  *"queued-resources create"*)
    printf 'pod\\tACTIVE\\n' >"$STAND_INS/request"
    printf 'pod\\tREADY\\n' >"$STAND_INS/tpu" ;;
  *"queued-resources delete"*) rm -f "$STAND_INS/request" "$STAND_INS/tpu" ;;
  *"tpu_worker.sh status"*)
    echo >>"$STAND_INS/looks"
    answer=${statuses[$(wc -l <"$STAND_INS/looks") - 1]}
    if [[ $answer == preempted ]]; then
      printf 'pod\\tSUSPENDED\\n' >"$STAND_INS/request"
      printf 'pod\\tPREEMPTED\\n' >"$STAND_INS/tpu"
      exit 255
    fi
    printf '%b' "$answer" ;;
esac
"""
    )


def words(calls):
    """A short form of calls to gcloud: what they do."""
    known = r"(queued-resources|tpu-vm) (\w+)"
    short = []
    for call in calls:
        line = " ".join(call)
        does = re.search(r"tpu_worker\.sh (status|setup|run|data)", line)
        short.append(does[1] if does else re.search(known, line)[0])
    return short


def training(stand_ins, *arguments, status=0):
    return stand_ins.run(
        "tpu_pod.sh", "train", *POD, *TYPE, *arguments, "--", *AWKWARD, WORKDIR, status=status
    )


FROM_NOTHING = ["tpu-vm list", "queued-resources list", "queued-resources create", "tpu-vm list"]
START = ["status", "tpu-vm scp", "tpu-vm ssh", "setup", "run"]
LOOK = ["tpu-vm list", "status"]


def test_train_from_nothing_to_the_end(tmp_path):
    stand_ins = StandIns(tmp_path, "sleep")
    running = r"semiseg a ended 0\nsemiseg b running\n"
    done = r"semiseg a ended 0\nsemiseg b ended 0\n"
    stand_ins.add("gcloud", answering("semiseg - none", running, done))
    output, _ = training(stand_ins, "--then-delete")
    calls = [c for c in stand_ins.recorded() if c[0] == "gcloud"]
    end = ["queued-resources list", "queued-resources delete", "tpu-vm list"]
    assert words(calls) == [*FROM_NOTHING, *START, *LOOK, *LOOK, *end]
    assert full([LIST_TPUS, LIST_REQUESTS, QUEUE]) == calls[:3]
    assert full([STATUS]) == calls[4:5]
    assert full([SETUP, RUN]) == calls[7:9]
    assert "The run is complete." in output


def test_train_asks_for_another_tpu_when_it_is_preempted_and_resumes(tmp_path):
    stand_ins = StandIns(tmp_path, "sleep")
    new, lost = "semiseg - none", r"semiseg a ended 1\nsemiseg b ended 75\n"
    answers = (new, "semiseg a running", lost, "preempted", new, "semiseg a ended 0")
    stand_ins.add("gcloud", answering(*answers))
    training(stand_ins)
    calls = [c for c in stand_ins.recorded() if c[0] == "gcloud"]
    again = ["tpu-vm list", "queued-resources list"]  # it is gone
    again += ["queued-resources list", "queued-resources delete", "tpu-vm list"]  # all of it
    again += ["queued-resources create", "tpu-vm list"]
    assert words(calls) == [*FROM_NOTHING, *START, *LOOK * 3, *again, *START, *LOOK]
    runs = [c for c in calls if " run " in c[-1]]
    assert runs == full([RUN, RUN])


@pytest.mark.parametrize(
    ("statuses", "status", "sentence"),
    [
        (("semiseg a running", "semiseg a stopped"), 75, "The same command continues the run"),
        (("semiseg a running", "semiseg a ended 3", "semiseg a ended 3"), 3, "ended with status 3"),
        # How it ended before this command says nothing of this one.
        (("semiseg a stopped", "semiseg a ended 0"), 0, "The run is complete"),
        (("semiseg a ended 1", "semiseg a ended 75", "semiseg a ended 0"), 0, "complete"),
    ],
)
def test_how_train_ends(tmp_path, statuses, status, sentence):
    stand_ins = StandIns(tmp_path, "sleep")
    stand_ins.add("gcloud", answering(*statuses))
    output, errors = training(stand_ins, status=status)
    assert sentence in output + errors


def test_train_gives_up_on_a_tpu_that_cannot_be_reached(tmp_path):
    stand_ins = StandIns(tmp_path, "sleep")
    stand_ins.add("gcloud", THERE + 'case $* in *" ssh "*) exit 255 ;; esac')
    _, errors = training(stand_ins, status=1)
    assert "Error: pod cannot be reached" in errors


def test_train_leaves_a_failed_request_to_the_user(tmp_path):
    stand_ins = StandIns(tmp_path, "sleep")
    stand_ins.add("gcloud", "case $* in *queued*list*) printf 'pod\\tFAILED\\n' ;; esac")
    _, errors = training(stand_ins, status=1)
    assert "The request for pod failed" in errors


def test_train_dry_run(tmp_path):
    stand_ins = StandIns(tmp_path, "tar", "rm")
    stand_ins.add("gcloud", answering(*["semiseg - none"] * 9))
    lines, _ = training(stand_ins, "--dry-run", "--data=gs://bucket/my data", "--then-delete")
    assert not stand_ins.recorded()
    stand_ins.paste(lines)
    calls = [c for c in stand_ins.recorded() if c[0] == "gcloud"]
    assert words(calls) == [
        *("tpu-vm list", "queued-resources list", "queued-resources create", "status"),
        *("tpu-vm scp", "tpu-vm ssh", "setup", "data", "run", "status"),
        *("queued-resources list", "queued-resources delete", "tpu-vm list", "tpu-vm delete"),
    ]


# TPU pods: what the workers do, in a home of this machine

# ssh has a shell run the command, in the home.
REMOTE = """case $* in
  *" scp "*) cp "$5" "$HOME/semiseg_jax.tar.gz" ;;
  *" ssh "*) cd "$HOME" && bash -c "${!#/#--command=/}" ;;
esac
"""


@pytest.fixture
def worker(tmp_path):
    """Stand-ins whose gcloud has a worker: it has Python 3.10 and pip, and its uv is recorded."""
    stand_ins = StandIns(tmp_path, "uv", "python", "hostname")
    for name in ("requirements.txt", "requirements-tpu.txt"):
        shutil.copy(ROOT / name, stand_ins.project)
    stand_ins.add("gcloud", THERE + REMOTE)
    stand_ins.add("python3", 'mkdir -p uv/bin && cp "$STAND_INS/uv" uv/bin')
    (stand_ins.folder / "uv.does").write_text(
        'if [[ $1 == venv ]]; then mkdir -p venv/bin && cp "$STAND_INS/python" venv/bin; fi'
    )
    (stand_ins.folder / "hostname.does").write_text("echo worker-0")
    stand_ins.run("tpu_pod.sh", "copy", *POD)
    stand_ins.recorded()
    return stand_ins


def ask(worker, task, *arguments):
    return worker.run("tpu_pod.sh", task, *POD, *arguments)[0]


def until(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_setup_installs_once(worker):
    ask(worker, "setup")
    calls = [c for c in worker.recorded() if c[0] in ("python3", "uv")]
    assert [c[:3] for c in calls] == [
        ["python3", "-m", "pip"],
        ["uv", "venv", "--quiet"],
        ["uv", "pip", "install"],
    ]
    assert calls[0][-1].startswith("uv==")
    assert calls[1][3:] == ["--python", ">=3.11,<3.14", "venv"]
    assert calls[2][-2:] == ["-r", "project/requirements-tpu.txt"]
    ask(worker, "setup")
    assert [c[0] for c in worker.recorded()] == ["gcloud"]


def test_arguments_arrive_as_they_were_given(worker):
    ask(worker, "setup")
    worker.recorded()
    ask(worker, "run", "--", *AWKWARD, WORKDIR, "", "new\nline", "back\\slash")
    until(lambda: "ended 0" in ask(worker, "status"))
    (call,) = [c for c in worker.recorded() if c[0] == "python"]
    expected = [*AWKWARD, WORKDIR, "", "new\nline", "back\\slash"]
    assert call == ["python", "-m", "semiseg_jax.main", *expected]


def test_a_run_is_started_once_told_to_stop_and_started_again(worker):
    (worker.folder / "python.does").write_text(
        "trap 'echo saved; exit 75' TERM; echo training in $PWD; "
        "for _ in {1..600}; do sleep 0.05; done"
    )
    run = ("run", "--", WORKDIR)
    ask(worker, "setup")
    assert "semiseg worker-0 none" in ask(worker, "status")
    ask(worker, *run)
    until(lambda: "training in" in ask(worker, "logs"))
    assert "semiseg worker-0 running" in ask(worker, "status")
    assert "under way already" in ask(worker, *run)
    ask(worker, "stop")
    until(lambda: "semiseg worker-0 stopped" in ask(worker, "status"))
    log = ask(worker, "logs")
    home = Path(worker.environment["HOME"])
    assert f"training in {home}/semiseg/project" in log and "saved" in log
    assert "nothing is running" in ask(worker, "stop")
    (worker.folder / "python.does").write_text("exit 3")
    ask(worker, *run)
    until(lambda: "semiseg worker-0 ended 3" in ask(worker, "status"))


def test_a_run_is_told_to_stop_in_the_moment_it_starts(worker):
    (worker.folder / "python.does").write_text(
        "trap 'exit 75' TERM; for _ in {1..600}; do sleep 0.05; done"
    )
    ask(worker, "setup")
    worker.add("setsid", 'sleep 1; exec "$@"')
    ask(worker, "run", "--", WORKDIR)
    ask(worker, "stop")
    until(lambda: "semiseg worker-0 stopped" in ask(worker, "status"))


def test_copy_keeps_data_and_environment_and_leaves_nothing_old(worker):
    semiseg = Path(worker.environment["HOME"]) / "semiseg"
    (semiseg / "data" / "mine").mkdir()
    (semiseg / "project" / "old.py").touch()
    (worker.project / "data" / "big").mkdir(parents=True)
    (worker.project / "semiseg_jax" / "data").mkdir(parents=True)
    (worker.project / "semiseg_jax" / "data" / "image_io.py").touch()
    ask(worker, "copy")
    project = semiseg / "project"
    assert not (project / "old.py").exists()
    assert (project / "semiseg_jax" / "data" / "image_io.py").exists()
    assert [p.name for p in (project / "data").iterdir()] == ["mine"]


def test_data_goes_to_the_folder_of_its_name(worker):
    ask(worker, "data", "--data=gs://bucket/my data/")
    assert worker.recorded()[1] == [
        *("gcloud", "storage", "rsync", "--recursive", "gs://bucket/my data", "data/my data")
    ]


# Slurm

SLURM = ("--nodes=2", "--gpus-per-node=4", "--time=8:00:00", "--sbatch=--comment=my own")


def sbatch(project):
    return [
        *("sbatch", "--job-name=semiseg", "--nodes=2", "--ntasks-per-node=4"),
        *("--gpus-per-node=4", "--cpus-per-task=8", "--time=8:00:00", "--signal=TERM@300"),
        *("--requeue", "--open-mode=append", f"--chdir={project}"),
        *("--output=slurm-%x-%j.out", "--comment=my own", f"{project}/launch/slurm_job.sh"),
        *(f"{project}/.venv/bin/python", *AWKWARD),
    ]


def test_slurm_submits(tmp_path):
    stand_ins = StandIns(tmp_path, "sbatch")
    stand_ins.run("slurm.sh", *SLURM, "--", *AWKWARD)
    assert stand_ins.recorded() == [sbatch(stand_ins.project)]


def test_slurm_dry_run_prints_what_runs(tmp_path):
    stand_ins = StandIns(tmp_path, "sbatch")
    lines, _ = stand_ins.run("slurm.sh", *SLURM, "--dry-run", "--", *AWKWARD)
    assert not stand_ins.recorded()
    stand_ins.paste(lines)
    assert stand_ins.recorded() == [sbatch(stand_ins.project)]


SRUN = [
    *("srun", "--label", "--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=120"),
    *("--cpus-per-task=8", "/a b/python", "-m", "semiseg_jax.main", *AWKWARD),
]


@pytest.mark.parametrize(
    ("ends", "requeued", "status"), [(0, False, 0), (1, False, 1), (75, True, 75)]
)
def test_slurm_job_is_queued_again_when_it_was_interrupted(tmp_path, ends, requeued, status):
    stand_ins = StandIns(tmp_path, "scontrol")
    stand_ins.add("srun", f"exit {ends}")
    stand_ins.environment |= {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8"}
    stand_ins.run("slurm_job.sh", "/a b/python", *AWKWARD, status=status)
    requeue = [["scontrol", "requeue", "17"]] if requeued else []
    assert stand_ins.recorded() == [SRUN, *requeue]


def test_slurm_job_outlives_the_signal_that_its_processes_get(tmp_path):
    stand_ins = StandIns(tmp_path, "scontrol")
    stand_ins.add("srun", "touch started; sleep 0.5; exit 75")
    stand_ins.environment |= {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8"}
    job = stand_ins.start("slurm_job.sh", "python", cwd=tmp_path)
    until((tmp_path / "started").exists)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=100)
    assert job.returncode == 75
    assert stand_ins.recorded()[-1] == ["scontrol", "requeue", "17"]


# Processes on this machine

# Tells what it got, then does what the test has written; longer than any test, not for ever.
PROCESS = """
echo "at $SEMISEG_COORDINATOR $SEMISEG_PROCESS_ID of $SEMISEG_NUM_PROCESSES" \\
  "on ${JAX_PLATFORMS-all} ${JAX_NUM_CPU_DEVICES-all}"
id=$SEMISEG_PROCESS_ID
for_long() { for _ in {1..2400}; do sleep 0.05; done; }
# Here, with its traps set; then waits until all are.
all_here() {
  touch "$STAND_INS/here.$id"
  local i
  for ((i = 0; i < SEMISEG_NUM_PROCESSES; i++)); do
    until [[ -e $STAND_INS/here.$i ]]; do sleep 0.05; done
  done
}
"""


def cluster(tmp_path, does=""):
    stand_ins = StandIns(tmp_path)
    stand_ins.add("my python", PROCESS + does)
    return stand_ins, f"--python={stand_ins.folder}/my python"


def left_behind(folder):
    """Command lines of processes that still run a stand-in of the folder."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if str(folder) in line]


def test_cluster_gives_each_process_its_place(tmp_path):
    stand_ins, python = cluster(tmp_path)
    output, _ = stand_ins.run(
        "local_cluster.sh", "3", "--devices=2", "--port=20123", python, "--", *AWKWARD
    )
    assert sorted(output.splitlines()) == [
        f"[{i}] at 127.0.0.1:20123 {i} of 3 on cpu 2" for i in range(3)
    ]
    call = ["my python", "-m", "semiseg_jax.main", *AWKWARD]
    assert stand_ins.recorded() == [call] * 3


def test_cluster_finds_a_port_and_leaves_devices_alone(tmp_path):
    stand_ins, python = cluster(tmp_path)
    output, _ = stand_ins.run("local_cluster.sh", "2", python, "--", "--config=x")
    ports = {
        re.search(r"at 127.0.0.1:(2\d{4}) \d of 2 on all all", o)[1] for o in output.split("[")[1:]
    }
    assert len(ports) == 1


def test_cluster_dry_run_prints_what_runs(tmp_path):
    stand_ins, python = cluster(tmp_path)
    arguments = ("2", "--devices=2", "--port=20123", python)
    lines, _ = stand_ins.run("local_cluster.sh", *arguments, "--dry-run", "--", *AWKWARD)
    assert not stand_ins.recorded()
    stand_ins.paste(lines)
    call = ["my python", "-m", "semiseg_jax.main", *AWKWARD]
    assert stand_ins.recorded() == [call] * 2
    assert lines.splitlines()[0] == f"cd '{stand_ins.project}'"
    assert "SEMISEG_PROCESS_ID=1 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 " in lines


def test_a_process_that_fails_ends_the_others(tmp_path):
    does = "trap 'echo told; exit 75' TERM; all_here; ((id != 1)) || exit 3; for_long"
    stand_ins, python = cluster(tmp_path, does)
    output, errors = stand_ins.run("local_cluster.sh", "3", python, "--", "--config=x", status=3)
    assert "Process 1 ended with status 3." in errors
    assert "[0] told" in output and "[2] told" in output
    assert not left_behind(stand_ins.folder)


def test_a_process_that_does_not_end_is_killed(tmp_path):
    does = "trap '' TERM; all_here; ((id)) || exit 3; for_long"
    stand_ins, python = cluster(tmp_path, does)
    _, errors = stand_ins.run(
        "local_cluster.sh", "2", "--grace=1", python, "--", "--config=x", status=3
    )
    assert "killed: process 1" in errors
    assert not left_behind(stand_ins.folder)


def test_what_a_process_leaves_running_goes_with_it(tmp_path):
    stand_ins, python = cluster(tmp_path, 'bash "$STAND_INS/left" >/dev/null 2>&1 & sleep 0.2')
    (stand_ins.folder / "left").write_text("for _ in {1..600}; do sleep 0.05; done")
    stand_ins.run("local_cluster.sh", "2", python, "--", "--config=x")
    assert not left_behind(stand_ins.folder)


def test_interrupted_processes_are_left_to_save(tmp_path):
    # Process 0 alone is interrupted; 1 saves a little longer, and a signal would end it.
    does = "if ((id)); then trap 'exit 143' TERM; sleep 1; echo saved; fi; exit 75"
    stand_ins, python = cluster(tmp_path, does)
    output, _ = stand_ins.run("local_cluster.sh", "2", python, "--", "--config=x", status=75)
    assert "[1] saved" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_each_process_once(tmp_path, number):
    does = """
trap 'echo TERM; ((++told))' TERM
trap 'echo INT; ((++told))' INT
touch "$STAND_INS/ready.$id"
until ((told)); do sleep 0.05; done
sleep 0.$id
exit 75
"""
    stand_ins, python = cluster(tmp_path, does)
    # A session of its own, as a terminal would give it.
    process = stand_ins.start(
        "local_cluster.sh", "2", python, "--", "--config=x", start_new_session=True
    )
    until(lambda: all((stand_ins.folder / f"ready.{i}").exists() for i in range(2)))
    # Ctrl-C and a terminal that closes signal the whole group.
    send = process.send_signal if number == signal.SIGTERM else lambda n: os.killpg(process.pid, n)
    send(number)
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        process.terminate()
    assert process.returncode == 75
    name = "INT" if number == signal.SIGINT else "TERM"
    told = [line for line in output.splitlines() if line.endswith(("TERM", "INT"))]
    assert sorted(told) == [f"[0] {name}", f"[1] {name}"]
    assert not left_behind(stand_ins.folder)


def test_a_signal_reaches_those_that_are_only_being_started(tmp_path):
    stand_ins, python = cluster(tmp_path, "((id)) || kill -s TERM $PPID; for_long")
    _, errors = stand_ins.run("local_cluster.sh", "20", python, "--", "--config=x", status=75)
    assert "killed" not in errors
    assert not left_behind(stand_ins.folder)


def test_processes_that_a_signal_ended_were_interrupted(tmp_path):
    stand_ins, python = cluster(tmp_path, 'touch "$STAND_INS/ready"; for_long')
    process = stand_ins.start("local_cluster.sh", "1", python, "--", "--config=x")
    until((stand_ins.folder / "ready").exists)
    process.terminate()
    process.communicate(timeout=100)
    assert process.returncode == 75


def test_cluster_without_an_environment(tmp_path):
    stand_ins = StandIns(tmp_path)
    _, errors = stand_ins.run("local_cluster.sh", "2", "--", "--config=x", status=1)
    assert errors.endswith("is missing: run make setup, or give --python=.\n")
