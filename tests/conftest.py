"""Fixtures that several test files share.

Fixtures import optional packages and helper modules themselves, so that other tests do not need these modules.
"""

import pytest
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.random_util import seed_everything


@pytest.fixture
def quiet(tmp_path):
    """A fresh run folder that receives checkpoints but no logs. Every test starts with the same random seed."""
    logger.configure(str(tmp_path / "run"), format_strs=[])
    seed_everything(0)
    yield str(tmp_path / "run")
    logger.reset()


@pytest.fixture(scope="module")
def cpu():
    """Run on the CPU even if there is a GPU, with one thread: more threads slow small networks down."""
    before = th.get_num_threads()
    th.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist_util, "dev", lambda: th.device("cpu"))
        yield
    th.set_num_threads(before)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """The flags of classifier_sample.py for a small diffusion model and a small classifier with random weights."""
    from sampling import guided_networks

    return guided_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A folder with a complete archive of each dataset."""
    from archives import write_archives

    return write_archives(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="session")
def unpacked(archives, tmp_path_factory):
    """The output folder of each dataset script after an uninterrupted run: {name in COMMANDS: folder}."""
    from archives import COMMANDS, call, command

    folders = {name: tmp_path_factory.mktemp(name) for name in COMMANDS}
    for name, folder in folders.items():
        module, args = command(name, archives, folder)
        call(module, *args).check()
    return folders


@pytest.fixture(scope="session")
def inception_graph(tmp_path_factory):
    """The path of an Inception graph with seeded random weights. The golden values were computed with this graph."""
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).resolve().parent / "data" / "evaluator" / "make_graph.py"
    path = tmp_path_factory.mktemp("inception") / "graph.pb"
    subprocess.run([sys.executable, script, "-o", path], check=True, capture_output=True)
    return path
