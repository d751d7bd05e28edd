"""Fixtures for tests of several files, which ask for them by name.

What only some of the tests need, the fixtures import themselves: the rest do without it.
"""

import pytest
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.random_util import seed_everything


@pytest.fixture
def quiet(tmp_path):
    """A run's folder of its own, without any output in it but checkpoints; the same random numbers for each test."""
    logger.configure(str(tmp_path / "run"), format_strs=[])
    seed_everything(0)
    yield str(tmp_path / "run")
    logger.reset()


@pytest.fixture(scope="module")
def cpu():
    """The CPU, also where there is a GPU, and one thread: small networks lose time to threads that wait."""
    before = th.get_num_threads()
    th.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist_util, "dev", lambda: th.device("cpu"))
        yield
    th.set_num_threads(before)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """The flags of classifier_sample that name its two networks, small ones with random weights."""
    from sampling import guided_networks

    return guided_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A folder with every archive of a data set, whole."""
    from archives import write_archives

    return write_archives(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="session")
def unpacked(archives, tmp_path_factory):
    """What each data set's script writes, undisturbed: {its name in COMMANDS: folder}."""
    from archives import COMMANDS, call, command

    folders = {name: tmp_path_factory.mktemp(name) for name in COMMANDS}
    for name, folder in folders.items():
        module, args = command(name, archives, folder)
        call(module, *args).check()
    return folders


@pytest.fixture(scope="session")
def inception_graph(tmp_path_factory):
    """The path of a graph with the Inception graph's structure and seeded weights, as the original was run with."""
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).resolve().parent / "data" / "evaluator" / "make_graph.py"
    path = tmp_path_factory.mktemp("inception") / "graph.pb"
    subprocess.run([sys.executable, script, "-o", path], check=True, capture_output=True)
    return path
