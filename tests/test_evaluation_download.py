"""Downloading the Inception graph: incomplete files are never used, and errors are reported in one line."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from launch import clean_environment
from web import serving

from evaluations import inception
from evaluations.inception import download, expected_shapes, find_graph, read_graph
from guided_diffusion.errors import InputError


def write_graph(path, leave_out=(), **values):
    """Write a graph with all of Inception's nodes to a small file, by storing one repeated value per constant.

    :param leave_out: names of nodes that the graph lacks.
    :param values: a constant's value, by the constant's name with "__" in place of "/". The default is 0.01.
    """
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.types_pb2 import DT_FLOAT

    graph = GraphDef()
    for name, shape in expected_shapes().items():
        if name in leave_out:
            continue
        tensor = graph.node.add(name=name, op="Const").attr["value"].tensor
        tensor.dtype = DT_FLOAT
        tensor.float_val.append(values.get(name.replace("/", "__"), 0.01))
        for side in shape:
            tensor.tensor_shape.dim.add(size=side)
    path.write_bytes(graph.SerializeToString())
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return write_graph(tmp_path_factory.mktemp("graph") / "small.pb")


@pytest.fixture
def server(graph, monkeypatch):
    """A local web server for the graph. See web.serving."""
    monkeypatch.setenv("no_proxy", "*")
    with serving(graph.read_bytes()) as server:
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder. The graph is in no other folder where find_graph looks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "FILE_NAME", "graph_of_a_test.pb")
    return tmp_path / "cache" / "guided_diffusion"


def left_in(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.mark.parametrize("kind", ["whole", "unsaid"])
def test_the_graph_is_downloaded_once(kind, server, graph, cache, monkeypatch, capfd):
    monkeypatch.setattr(inception, "ADDRESS", server.address(kind))
    assert find_graph() == str(cache / "graph_of_a_test.pb")
    assert (cache / "graph_of_a_test.pb").read_bytes() == graph.read_bytes()
    assert all((constant == np.float32(0.01)).all() for constant in read_graph(find_graph()).values())
    assert left_in(cache) == ["graph_of_a_test.pb"]
    assert "downloading" in capfd.readouterr().err
    monkeypatch.setattr(inception, "ADDRESS", server.address("none"))
    assert find_graph() == str(cache / "graph_of_a_test.pb")


def test_a_graph_given_by_path_or_in_the_current_folder_is_used(server, graph, cache, monkeypatch):
    monkeypatch.setattr(inception, "ADDRESS", server.address("none"))
    assert find_graph(str(graph)) == str(graph)
    (cache.parent.parent / "graph_of_a_test.pb").write_bytes(graph.read_bytes())
    assert find_graph() == "graph_of_a_test.pb"  # from the current folder


# {the server's behaviour: words that the error message must contain}
TROUBLE = {
    "none": "Not Found",
    "garbage": "what is this",
    "ends": "bytes, of which",
    "chunked": "IncompleteRead",
    "resets": "reset by peer",
    "cut": "or truncated",
    "page": "not a TensorFlow graph",
}
RESUMED = {"ends", "chunked", "resets"}  # the next attempt resumes these downloads


@pytest.mark.parametrize("kind", TROUBLE)
def test_an_incomplete_or_wrong_download_is_refused(kind, server, graph, cache, monkeypatch):
    monkeypatch.setattr(inception, "ADDRESS", server.address(kind))
    with pytest.raises(InputError) as caught:
        find_graph()
    message = str(caught.value)
    assert "\n" not in message and ".part" not in message
    for words in (TROUBLE[kind], server.address(kind), str(cache / "graph_of_a_test.pb"), "--inception_path"):
        assert words in message, message
    assert left_in(cache) == (["graph_of_a_test.pb.part"] if kind in RESUMED else [])
    monkeypatch.setattr(inception, "ADDRESS", server.address("whole"))
    assert find_graph() == str(cache / "graph_of_a_test.pb")
    assert server.asked[-1].startswith("bytes=") == (kind in RESUMED)
    assert (cache / "graph_of_a_test.pb").read_bytes() == server.content
    assert left_in(cache) == ["graph_of_a_test.pb"]


def test_a_graph_without_all_nodes_is_refused(server, cache, tmp_path):
    server.content = write_graph(tmp_path / "other.pb", leave_out=["mixed_6/conv/conv2d_params"]).read_bytes()
    with pytest.raises(InputError, match="it has no node mixed_6/conv/conv2d_params"):
        download(server.address("whole"), str(cache / "graph.pb"))
    assert left_in(cache) == []


def test_a_folder_that_cannot_be_written_is_named(server, cache):
    cache.parent.mkdir()
    cache.write_text("a file where a folder should be")
    with pytest.raises(InputError, match=f"cannot be downloaded to {cache}/graph.pb"):
        download(server.address("whole"), str(cache / "graph.pb"))


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from evaluations import evaluator, inception
inception.ADDRESS, inception.FILE_NAME = sys.argv.pop(1), "graph_of_a_test.pb"
evaluator.main()
"""


def test_ctrl_c_leaves_no_incomplete_graph(server, cache, tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((4, 8, 8, 3), np.uint8))
    argv = [sys.executable, "-c", INTERRUPTED, server.address("stalls"), *[str(tmp_path / "images.npz")] * 2]
    env = clean_environment(no_proxy="*", XDG_CACHE_HOME=str(tmp_path / "cache"))
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "downloading" not in (line := process.stdout.readline()):
        assert line, "the evaluator ended before the download started"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in output, output
    assert output.splitlines()[-1] == "interrupted"
    assert left_in(cache) in ([], ["graph_of_a_test.pb.part"])


# Reading a graph


@pytest.mark.parametrize(
    "name", ["conv/conv2d_params", "mixed_10/tower_1/mixed/conv_1/batchnorm/beta", "softmax/weights"]
)
def test_the_first_missing_node_is_named(name, tmp_path):
    path = write_graph(tmp_path / "graph.pb", leave_out=[name])
    with pytest.raises(InputError, match=f"{path}: not the Inception graph of 2015 .*: it has no node {name}$"):
        read_graph(path)


@pytest.mark.parametrize("spoil", ["empty", "cut", "shape", "no constant"])
def test_a_node_with_the_wrong_content_is_named(spoil, graph, tmp_path):
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    found = GraphDef.FromString(graph.read_bytes())
    node = next(node for node in found.node if node.name == "conv_1/batchnorm/beta")
    tensor = node.attr["value"].tensor
    if spoil == "no constant":
        node.ClearField("attr")
    else:
        tensor.ClearField("float_val")
    if spoil in ("cut", "shape"):
        tensor.tensor_content = b"\0" * (50 if spoil == "cut" else 4 * 33)
        tensor.tensor_shape.dim[0].size = 33
    (tmp_path / "spoilt.pb").write_bytes(found.SerializeToString())
    with pytest.raises(InputError) as caught:
        read_graph(tmp_path / "spoilt.pb")
    message = str(caught.value)
    assert "\n" not in message and "spoilt.pb" in message and "conv_1/batchnorm/beta" in message and "(32,)" in message
