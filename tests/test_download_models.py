"""scripts/download_models.py: a file arrives complete and fits its network, or one line says what went wrong."""

import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch as th
from helpers import refused
from launch import clean_environment, run_ranks, script
from sampling import MODEL, new_network, run_here
from web import serving

from guided_diffusion import presets
from guided_diffusion.downloads import download_file
from guided_diffusion.errors import InputError
from guided_diffusion.presets import MODELS, PRESETS, Preset

TINY = Preset("diffusion", "tiny.pt", MODEL)

# Runs a script with an additional small preset, whose file is served at the address argv[1].
WITH_TINY = """
import runpy, sys
from guided_diffusion import presets
from sampling import MODEL
presets.ADDRESS = sys.argv.pop(1)
presets.PRESETS["tiny"] = presets.Preset("diffusion", "tiny.pt", MODEL)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the bytes of a checkpoint that fits TINY."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    th.save(new_network(MODEL).state_dict(), path)
    return path.read_bytes()


@pytest.fixture
def server(tiny, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving(tiny) as server:
        yield server


def run(address, *argv):
    """Run download_models.py in a subprocess. Returns the exit status, and stdout and stderr combined."""
    argv = [address, script("download_models"), *argv]
    outcome = run_ranks(None, argv, code=WITH_TINY, env=dict(no_proxy="*"), quick_end=True)[0]
    assert "Traceback" not in outcome.output, outcome.output
    return outcome.returncode, outcome.output


def download(monkeypatch, address, folder, *names):
    """Run download_models.py in the test process. The script's InputError is raised to the caller."""
    with monkeypatch.context() as patch:
        patch.setattr(presets, "ADDRESS", address)
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setattr(sys, "argv", ["download_models.py", *names, "--models_dir", str(folder)])
        runpy.run_path(script("download_models"))["main"]()


def fit(path):
    th.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["tiny", "tiny.pt"])
def test_a_file_is_downloaded_only_once_by_either_name(name, server, tiny, tmp_path, monkeypatch, capsys):
    for _ in range(2):
        download(monkeypatch, server.address("whole"), tmp_path / "models", name)
    assert os.listdir(tmp_path / "models") == ["tiny.pt"]
    assert (tmp_path / "models" / "tiny.pt").read_bytes() == tiny
    assert server.asked == [""] and "exists already" in capsys.readouterr().out


def test_download_resumes_after_ctrl_c(server, tiny, tmp_path):
    env = clean_environment(no_proxy="*")
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], os.path.dirname(__file__)])
    argv = [sys.executable, "-c", WITH_TINY, server.address("stalls"), script("download_models"), "tiny"]
    process = subprocess.Popen([*argv, "--models_dir", tmp_path], env=env, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "tiny.pt.part"
    while not part.exists() or not part.stat().st_size:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert os.listdir(tmp_path) == ["tiny.pt.part"] and tiny.startswith(have := part.read_bytes())

    status, output = run(server.address("whole"), "tiny", "--models_dir", tmp_path)
    assert status == 0 and "%" in output  # the progress bar was shown
    assert server.asked == ["", f"bytes={len(have) - 1}-"]
    assert os.listdir(tmp_path) == ["tiny.pt"] and (tmp_path / "tiny.pt").read_bytes() == tiny


@pytest.mark.parametrize("kind", ["none", "page", "cut", "ends"])
def test_download_errors_end_in_one_line(kind, server, tmp_path):
    status, output = run(server.address(kind), "tiny", "--models_dir", tmp_path)
    words = {"none": "404", "page": "a web page", "cut": "damaged", "ends": "run this again to resume"}[kind]
    last = output.splitlines()[-1]
    assert status == 1 and words in last and server.address(kind) in last
    assert os.listdir(tmp_path) == (["tiny.pt.part"] if kind == "ends" else [])


def test_a_refused_connection_is_reported_in_one_line(tmp_path):
    status, output = run("http://127.0.0.1:9", "tiny", "--models_dir", tmp_path)
    last = output.splitlines()[-1]
    assert status == 1 and "http://127.0.0.1:9/tiny.pt: cannot be downloaded" in last and "Connection refused" in last
    assert os.listdir(tmp_path) == []


def test_weights_of_another_network_are_refused(server, tmp_path, monkeypatch):
    th.save(new_network({**MODEL, "num_channels": 64}).state_dict(), tmp_path / "other.pt")
    server.content = (tmp_path / "other.pt").read_bytes()
    refused(
        lambda: download(monkeypatch, server.address("whole"), tmp_path / "models", "tiny"),
        server.address("whole/tiny.pt"), "do not fit", "time_embed.0.weight",
    )  # fmt: skip
    assert os.listdir(tmp_path / "models") == []


def test_an_unknown_name_is_answered_with_the_known_names(tmp_path, monkeypatch):
    refused(lambda: download(monkeypatch, "http://127.0.0.1:9", tmp_path, "256x256"), "'256x256'", *PRESETS, *MODELS)


def test_list_has_every_name_and_size():
    status, output = run("http://127.0.0.1:9", "--list")
    assert status == 0
    for name in (*PRESETS, *MODELS):
        assert any(line.startswith(name + " ") for line in output.splitlines())
    assert "2.2 GB  diffusion, 256 pixels, class-conditional" in output


# Partial downloads


@pytest.mark.parametrize("kind", ["whole", "no-ranges"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_partial_download_of_any_length_is_completed(kind, share, server, tiny, tmp_path):
    (tmp_path / "x.pt.part").write_bytes(tiny[: int(share * len(tiny))])
    download_file(server.address(kind), str(tmp_path / "x.pt"), fit)
    assert (tmp_path / "x.pt").read_bytes() == tiny and os.listdir(tmp_path) == ["x.pt"]


def test_a_partial_download_that_is_too_long_is_removed(server, tiny, tmp_path):
    (tmp_path / "x.pt.part").write_bytes(tiny + b"more")
    with pytest.raises(InputError, match="cannot be downloaded"):
        download_file(server.address("whole"), str(tmp_path / "x.pt"), fit)
    assert os.listdir(tmp_path) == []


def test_the_error_for_a_missing_preset_file_names_the_download_command(networks, tmp_path, monkeypatch):
    for options in (dict(preset="lsun_cat"), dict(MODEL, guide_preset="lsun_cat", model_path=networks["model_path"])):
        refused(
            lambda: run_here(monkeypatch, "image_sample", models_dir=tmp_path, log_dir=tmp_path / "log", **options),
            tmp_path / "lsun_cat.pt", f"scripts/download_models.py lsun_cat.pt --models_dir {tmp_path}",
            PRESETS["lsun_cat"].address,
        )  # fmt: skip
