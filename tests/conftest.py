"""Fixtures for tests of training and sampling, which ask for them by name."""

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
