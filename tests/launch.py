"""Start the project's commands, or snippets of Python, as a user would: with mpiexec, torchrun or plain python."""

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = os.path.join(ROOT, "scripts")
BIN = os.path.dirname(sys.executable)

# A network that trains in milliseconds, with attention at resolution 8.
TINY = dict(image_size=16, num_channels=32, channel_mult="1", num_res_blocks=1, num_heads=2, attention_resolutions="8")
TINY_CLASSIFIER = dict(
    image_size=16, num_classes=10, classifier_width=64, classifier_depth=1, classifier_attention_resolutions="8"
)


@dataclass
class Outcome:
    """The result of a command that has ended."""

    returncode: int
    output: str  # stdout and stderr together
    seconds: float
    ended: float  # time.time() when the command ended

    def check(self):
        """Fail with the output unless the command succeeded."""
        assert self.returncode == 0, self.output
        return self


def check_refused(done, words, start=r"(\w+\.py: )?error: ", last=True):
    """Check that a command failed with a single error line, which contains all of the words.

    :param start: a regular expression that the error line must start with.
    :param last: whether the error line must be the last one. Launchers and other ranks may print further lines.
    """
    assert done.returncode > 0 and "Traceback" not in done.output, done.output
    lines = [line.strip() for line in done.output.rstrip().splitlines()]
    assert done.output.count("error: ") == 1 and (not last or "error: " in lines[-1]), done.output
    (line,) = [line for line in lines if "error: " in line]
    assert re.match(start, line) and len(line) < 500, line  # an error line is short, not a dump of values
    assert all(str(word) in line for word in words), line


def flags(**values):
    """Convert flags to command-line arguments: flags(image_size=16) is ["--image_size", "16"]."""
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def script(name):
    """The path of a script of this project, by its name without ".py"."""
    return os.path.join(SCRIPTS, name + ".py")


def clean_environment(**extra):
    """os.environ without the variables that this project reads. Processes run on the CPU with one thread each."""
    ours = ("OPENAI_", "DIFFUSION_", "OMPI_", "PMI", "MASTER_", "TORCHELASTIC_")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in ranks}
    env.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    env.update(extra)
    return env


def run(argv, ranks=None, launcher="mpiexec", env=None, timeout=60):
    """Run Python with the given arguments and wait until the process ends.

    :param argv: the path of a script, or "-c" and a snippet, followed by the arguments.
    :param ranks: the number of ranks; None starts plain python without a launcher.
    :param launcher: "mpiexec" or "torchrun".
    :param env: environment variables to set, a dict.
    """
    command = [sys.executable, *argv]
    if ranks is not None and launcher == "mpiexec":
        command = [os.path.join(BIN, "mpiexec"), "-n", str(ranks), *command]
    elif ranks is not None:
        torchrun = [os.path.join(BIN, "torchrun"), "--standalone", "--nproc_per_node", str(ranks), "--no_python"]
        command = [*torchrun, *command]
    start = time.time()
    process = subprocess.Popen(
        command,
        env=clean_environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a timeout can kill the whole process group
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s: {' '.join(command)}\n{output}") from None
    return Outcome(process.returncode, output, time.time() - start, time.time())


# A server process imports all modules once and forks each job from itself. A job can be killed at a chosen moment.
# The code of a job is not wrapped: exceptions reach the interpreter, whose hooks print them and set the exit status.
# Jobs with quick_end=True handle exceptions themselves and skip the 0.25 s in which the interpreter frees its objects.

_SERVER = """
import atexit, gc, glob, json, os, signal, socket, sys, threading, time
import guided_diffusion.sample_job, guided_diffusion.classifier_util, guided_diffusion.image_datasets, sampling
import torch._dynamo  # optimisers import torch._dynamo, which takes more than a second
gc.freeze()  # garbage collection in a fork would write to, and so copy, every memory page

def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def become(job, rank, master_port):
    signal.alarm(job["limit"])
    fd = os.open(job["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(fd, 1), os.dup2(fd, 2)
    os.environ.update(job["env"])
    if ranks := job["ranks"]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(master_port))
    sys.argv = ["-c", *job["argv"]]

def kill(children):
    for child in children:
        os.kill(child, signal.SIGKILL)

def watch(job, children):
    # Wait until all ranks have ended, and kill the ranks if the paths that the job waits for appear first.
    # Returns the first nonzero exit status (0 if there is none) and whether the ranks were killed.
    alive, first, failed_at, killed = list(children), 0, None, False
    while alive:
        for child in list(alive):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                alive.remove(child)
                if status and not first:
                    first, failed_at = os.waitstatus_to_exitcode(status), time.time()
        if first and time.time() - failed_at > 0.1:  # like a launcher: end the job when one rank has failed
            kill(alive)
        if job["pattern"] and not killed and len(glob.glob(job["pattern"])) >= job["count"]:
            time.sleep(job["delay"])
            kill(alive)  # the process id of an ended child stays reserved until waitpid
            killed = True
        time.sleep(0.0005)
    return first, killed

for line in sys.stdin:
    job, start, master_port, children = json.loads(line), time.time(), port(), []
    open(job["output"], "w").close()
    for rank in range(job["ranks"] or 1):
        child = os.fork()
        if not child:
            break
        children.append(child)
    if not child:
        become(job, rank, master_port)
        break
    status, killed = watch(job, children)
    output = open(job["output"], errors="replace").read()
    print(json.dumps([killed, status, output, time.time() - start, time.time()]), flush=True)
else:
    sys.exit()
if not job["quick_end"]:
    exec(job["code"], {"__name__": "__main__"})
    sys.exit()
status = 0
try:
    exec(job["code"], {"__name__": "__main__"})
except SystemExit as e:
    status = e.code or 0
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
except BaseException as e:
    sys.excepthook(type(e), e, e.__traceback__)
    status = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
os._exit(status)
"""

# Code for a rank that runs the script whose path is the first argument.
RUN_SCRIPT = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@functools.cache
def _server():
    env = clean_environment()
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], os.path.join(ROOT, "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.stdin.close)
    return process


def run_ranks(ranks, argv, code=RUN_SCRIPT, kill_at=None, env=None, limit=60, quick_end=False):
    """Run code on several ranks, with the environment variables that torchrun sets, in forks that have imported torch.

    :param ranks: the number of ranks; None runs one process without a launcher's environment variables.
    :param argv: the arguments of the code, sys.argv[1:].
    :param kill_at: (pattern, count, seconds): send SIGKILL to all ranks `seconds` after `count` paths match `pattern`.
    :param quick_end: skip the interpreter's shutdown, in tests that do not check how processes end.
    :return: an Outcome with the first nonzero return code of a rank, and whether kill_at killed the ranks.
    """
    pattern, count, delay = kill_at or ("", 0, 0)
    with tempfile.NamedTemporaryFile() as output:
        job = dict(ranks=ranks, argv=[str(a) for a in argv], code=code, output=output.name, limit=limit)
        job.update(quick_end=quick_end, env=env or {}, pattern=str(pattern), count=count, delay=delay)
        process = _server()
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        killed, *outcome = json.loads(process.stdout.readline())
    return Outcome(*outcome), killed


def run_forked(jobs, env=None):
    """Run several scripts one after the other, each in one process without a launcher.

    :param jobs: a dict of argument lists, each with the path of a script and its flags.
    :return: a dict of Outcomes, with the keys of `jobs`.
    """
    return {key: run_ranks(None, argv, env=env, quick_end=True)[0] for key, argv in jobs.items()}
