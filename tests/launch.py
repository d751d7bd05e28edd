"""Starting the project's commands, or snippets of Python, as a user would: under mpiexec, torchrun or plain python."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = os.path.join(ROOT, "scripts")
BIN = os.path.dirname(sys.executable)

# A network that trains in milliseconds; attention at the lower of its resolutions.
TINY = dict(image_size=16, num_channels=32, channel_mult="1", num_res_blocks=1, num_heads=2, attention_resolutions="8")
TINY_CLASSIFIER = dict(
    image_size=16, num_classes=10, classifier_width=64, classifier_depth=1, classifier_attention_resolutions="8"
)

# Goes before a command: a Ctrl-C comes when its first progress bar is about to be made.
BAR_INTERRUPTED = """
import tqdm
def interrupted(*args, **options):
    raise KeyboardInterrupt
tqdm.tqdm.__init__ = interrupted
"""


@dataclass
class Outcome:
    """How a command ended."""

    returncode: int
    output: str  # stdout and stderr together
    seconds: float
    ended: float  # time.time() of its end

    def check(self):
        """Fail with the output unless the command succeeded."""
        assert self.returncode == 0, self.output
        return self


def flags(**values):
    """Flags as a list of arguments: flags(image_size=16) is ["--image_size", "16"]."""
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def script(name):
    """The path of one of the commands."""
    return os.path.join(SCRIPTS, name + ".py")


def clean_environment(**extra):
    """The environment without what this project reads from it, on the CPU, with one thread a process."""
    ours = ("OPENAI_", "DIFFUSION_", "OMPI_", "PMI", "MASTER_", "TORCHELASTIC_")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in ranks}
    env.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    env.update(extra)
    return env


def run(argv, ranks=None, launcher="mpiexec", env=None, timeout=60):
    """Run python with these arguments and wait for its end.

    :param argv: a script's path, or "-c" and a snippet, and its arguments.
    :param ranks: how many processes; None starts plain python without a launcher.
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
        start_new_session=True,  # a group of its own, so that nothing of it outlives a timeout
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not over after {timeout} s: {' '.join(command)}\n{output}") from None
    return Outcome(process.returncode, output, time.time() - start, time.time())


# Each job runs in a fork of one process that has the imports behind it. Nothing surrounds the script there: exceptions
# reach the interpreter, its hooks print and its exit status is what a user's shell would see.
_FORKS = """
import gc, json, os, runpy, signal, sys, time
import guided_diffusion.sample_job, guided_diffusion.classifier_util, guided_diffusion.image_datasets
gc.freeze()  # collections in the forks would touch, and so copy, every page
jobs, folder, limit = json.loads(sys.argv[1])
results = []
for i, job in enumerate(jobs):
    start, path = time.time(), os.path.join(folder, f"job{i}.txt")
    child = os.fork()
    if child == 0:
        signal.alarm(limit)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1), os.dup2(fd, 2)
        os.environ.update(job["env"])
        sys.argv = job["argv"]
        break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([status, open(path, errors="replace").read(), time.time() - start, time.time()])
else:
    print(json.dumps(results))
    sys.exit()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_forked(jobs, folder, env=None, timeout=60):
    """Run several scripts one after the other as plain python would, without importing torch anew for each.

    :param jobs: a dict of argument lists (a script's path and its flags).
    :param folder: a folder for their output.
    :return: a dict of Outcomes with the same keys.
    """
    listed = [{"argv": list(argv), "env": env or {}} for argv in jobs.values()]
    done = run(["-c", _FORKS, json.dumps([listed, str(folder), timeout])], timeout=timeout + 2 * len(listed)).check()
    return {key: Outcome(*result) for key, result in zip(jobs, json.loads(done.output.splitlines()[-1]))}
