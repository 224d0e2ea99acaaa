"""ONNX files are looked at before an engine does: cut, forged, deep, or with tensors in files that are none of theirs."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from joulemark import onnx_header as module
from joulemark.errors import ModelRejected
from joulemark.onnx_header import read_onnx
from tests.fixtures import tiny_graphs

FILES = {"model.onnx": 1 << 20, "model.onnx.data": 1000}


def tensor(location: str | None = None, name: str = "w", **more: str) -> TensorProto:
    made = helper.make_tensor(name, TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])
    if location is not None:
        made.ClearField("float_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": "16", **more}.items():
            made.external_data.add(key=key, value=value)
    return made


def graph(initializers: list[TensorProto], nodes: list[onnx.NodeProto] | None = None) -> onnx.GraphProto:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    return helper.make_graph(nodes or [helper.make_node("Identity", ["w"], ["y"])], "g", [], [value], initializers)


def write(folder: Path, made: onnx.GraphProto, change: Callable[[onnx.ModelProto], None] = lambda _: None) -> Path:
    model = helper.make_model(made)
    change(model)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path, graph([tensor(), tensor("model.onnx.data", "v")]))


def test_a_graph_of_ours_is_taken_with_its_weights_inside_and_beside(tmp_path: Path, good: Path):
    facts = read_onnx(good, FILES)
    assert (facts.tensors, dict(facts.external)) == (2, {"model.onnx.data": 1})
    path = tiny_graphs.write(tmp_path, "llama")
    files = {file.name: file.stat().st_size for file in path.parent.iterdir()}
    facts = read_onnx(path, files)
    assert facts.tensors > 10 and set(facts.external) <= set(files)


OUTSIDE = ["../secret", "/etc/passwd", "model.onnx.data/../x", "./model.onnx.data", "other.data", ""]
OUTSIDE += ["C:\\x", "model.onnx.DATA", "x" * 1000]


@pytest.mark.parametrize("location", OUTSIDE)
def test_tensors_lie_in_the_artifacts_own_files_only(tmp_path: Path, location: str):
    path = write(tmp_path, graph([tensor(location)]))
    with pytest.raises(ModelRejected, match="no file of this artifact") as raised:
        read_onnx(path, FILES)
    assert raised.value.hint and len(raised.value.message) < 400


def hidden(where: str, location: str = "/etc/passwd") -> onnx.GraphProto:
    """A graph with a tensor outside, in a place where one does not look at first."""
    bad = tensor(location)
    if where == "constant":
        return graph([tensor()], [helper.make_node("Constant", [], ["y"], value=bad)])
    if where == "branch":
        inner = graph([bad])
        return graph([tensor()], [helper.make_node("If", ["w"], ["y"], then_branch=inner, else_branch=inner)])
    if where == "list":
        node = helper.make_node("X", [], ["y"])
        node.attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.append(bad)
        return graph([tensor()], [node])
    if where == "sparse":
        made = graph([tensor()])
        made.sparse_initializer.add().values.CopyFrom(bad)
        return made
    assert where == "no flag"  # the entry alone, without saying that the data lie elsewhere
    bad.data_location = TensorProto.DEFAULT
    return graph([bad])


@pytest.mark.parametrize("where", ["constant", "branch", "list", "sparse", "no flag"])
def test_also_where_one_does_not_look_at_first(tmp_path: Path, where: str):
    with pytest.raises(ModelRejected, match="no file of this artifact"):
        read_onnx(write(tmp_path, hidden(where)), FILES)


def test_also_in_a_function(tmp_path: Path):
    def change(model: onnx.ModelProto) -> None:
        node = helper.make_node("Constant", [], ["y"], value=tensor("/etc/passwd"))
        model.functions.append(helper.make_function("d", "f", [], ["y"], [node], [helper.make_opsetid("", 20)]))

    with pytest.raises(ModelRejected, match="no file of this artifact"):
        read_onnx(write(tmp_path, graph([tensor()]), change), FILES)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"offset": "985"}, "which has 1000"),
        ({"length": "1001"}, "which has 1000"),
        ({"offset": "-1"}, "which has"),
        ({"offset": "9" * 50}, "which has"),
        ({"length": "many"}, "no number"),
        ({"location": "x" * 2000}, "no way"),
    ],
)
def test_places_in_a_file_lie_inside_it(tmp_path: Path, more: dict[str, str], words: str):
    location = more.pop("location", "model.onnx.data")
    with pytest.raises(ModelRejected, match=words):
        read_onnx(write(tmp_path, graph([tensor(location, **more)])), FILES)


def test_a_flag_without_a_place_is_refused(tmp_path: Path):
    made = tensor()
    made.data_location = TensorProto.EXTERNAL
    with pytest.raises(ModelRejected, match="no file"):
        read_onnx(write(tmp_path, graph([made])), FILES)


def test_shapes_that_nothing_can_hold(tmp_path: Path):
    for dims in ([1 << 41], [1 << 21, 1 << 21], [-1], [1 << 30, 1 << 30, 1 << 30]):
        made = tensor()
        del made.dims[:]
        made.dims.extend(dims)
        with pytest.raises(ModelRejected, match="shape"):
            read_onnx(write(tmp_path, graph([made])), FILES)


def test_training_information_two_graphs_none_and_pickles(tmp_path: Path):
    def training(model: onnx.ModelProto) -> None:
        model.training_info.add().algorithm.CopyFrom(graph([tensor()]))

    with pytest.raises(ModelRejected, match="training"):
        read_onnx(write(tmp_path, graph([tensor()]), training), FILES)
    path = tmp_path / "x.onnx"
    twice = helper.make_model(graph([tensor()])).SerializeToString() * 2
    for body, words in (
        (twice, "2 graphs"),
        (b"\x08\x07" * 8, "0 graphs"),
        (b"", "too short"),
        (b"\x80\x04\x95" + bytes(100), "field"),
    ):
        path.write_bytes(body)
        with pytest.raises(ModelRejected, match=words):
            read_onnx(path, FILES)


def test_depth_and_number_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = graph([tensor()])
    for _ in range(20):
        made = graph([tensor()], [helper.make_node("If", ["w"], ["y"], then_branch=made)])
    with pytest.raises(ModelRejected, match="deep"):
        read_onnx(write(tmp_path, made), FILES)
    monkeypatch.setattr(module, "MAX_MESSAGES", 100)
    with pytest.raises(ModelRejected, match="more than 100 parts"):
        read_onnx(write(tmp_path, graph([tensor(name=f"w{n}") for n in range(101)])), FILES)


def test_every_cut_is_found_or_leaves_a_whole_graph(good: Path):
    body = good.read_bytes()
    refused = 0
    for length in range(len(body)):
        good.write_bytes(body[:length])
        try:
            read_onnx(good, FILES)
        except ModelRejected:
            refused += 1
    assert refused >= len(body) - 20  # fields after the graph may be missing: it is a graph without them


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_altered_bytes_do_anything_but_pass_or_be_refused(good: Path, data: st.DataObject):
    body = bytearray(helper.make_model(hidden("branch", "model.onnx.data")).SerializeToString())
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    path = good.with_name("altered.onnx")
    path.write_bytes(body)
    try:
        assert set(read_onnx(path, FILES).external) <= set(FILES)
    except ModelRejected as error:
        assert error.hint


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_noise_is_refused_or_harmless(good: Path, noise: bytes):
    path = good.with_name("noise.onnx")
    path.write_bytes(noise)
    with contextlib.suppress(ModelRejected):
        read_onnx(path, FILES)


def test_a_giant_costs_little_time_and_memory(tmp_path: Path):
    """A length bomb, and a file whose weights are inside: only the structure is read."""
    made = helper.make_tensor("w", TensorProto.FLOAT, [4_000_000], bytes(16_000_000), raw=True)
    path = write(tmp_path, graph([made] + [tensor(name=f"w{n}") for n in range(2000)]))
    tracemalloc.start()
    began = time.perf_counter()
    read_onnx(path, FILES)
    took, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 2.0 and peak < 8 << 20
    path.write_bytes(b"\x3a" + b"\xff" * 9 + b"\x01" + bytes(100))
    with pytest.raises(ModelRejected, match="cut or forged"):
        read_onnx(path, FILES)
