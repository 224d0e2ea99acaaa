"""Where the fuzzer begins: one right input for each parser, of which it then makes others."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from onnx import TensorProto, helper

from joulemark import packs
from joulemark.lineage import Evidence
from joulemark.packs import canonical_json
from joulemark.protocol import HostFacts
from joulemark.statements import Envelope, FetchOrder
from joulemark.wire import RunRecord, TaskPack
from joulemark_agent.profiles import profile_folder
from tests.fixtures import gguf_files, records
from tests.fuzz.parsers import KEY

WIRE = Path(__file__).parents[1] / "fixtures" / "golden" / "wire" / "1"


DIGITS = b"9" * 5000
"""More than Python turns into a number."""
BOMBS = (
    DIGITS,
    b"cpu " + DIGITS + b" 1 1 1 1\n",
    b"x) R" + b" " + b" ".join([DIGITS] * 14),
    b"some total=" + DIGITS,
    b"time_s,p:power_w\n" + DIGITS + b",1\n",
    b"\n\n" + DIGITS + b"\n0-" + DIGITS,
    b"\n\n\n0-99999999999\n",
    b"x = " + DIGITS,
    b"x = " + b"[" * 100_000,
    b"x" + b".x" * 50_000 + b" = 1",
    b'{"x": ' + DIGITS + b"}",
    b'{"x": 1e' + DIGITS + b"}",
    b"[" * 100_000,
    b'{"x":' * 100_000,
    b'{"x": "\\ud800"}',
    b"\xff\xfe\x00",
    b'"' + b"a" * 200_000 + b"\n" * 10,
)
"""Inputs that are longer or deeper than what a fuzzer makes up, for every parser."""


def beginnings() -> Mapping[str, list[bytes]]:
    """By parser. What is left out begins with nothing."""
    wire = {path.stem: path.read_bytes() for path in WIRE.glob("*.json")}
    enrolment_key = f"jme.{'a' * 22}.{'b' * 43}.{'c' * 64}"
    return {
        "gguf": [gguf_files.whole(gguf_files.llama()), _tiny()],
        "onnx": [_graph()],
        "manifest": [wire["Manifest"]],
        "pack": [_pack(wire)],
        "record": [records.record_bytes(_record())],
        "evidence": [_evidence(wire)],
        "envelope": [wire["Envelope"], _signed(wire).model_dump_json(by_alias=True).encode()],
        "samples": [
            b'{"doc_id": 0, "target": "1", "arguments": [["q", " a"], ["q", " b"]], "resps": [[["-1.5", "False"]], '
            b'[["-0.5", "True"]]], "filtered_resps": [["-1.5", "False"]], "filter": "none", "acc": 1.0}\n',
            b'{"doc_id": 1, "target": "7", "arguments": {"gen_args_0": {"arg_0": "q", "arg_1": {"until": ["x"]}}}, '
            b'"resps": [["7"]], "filtered_resps": ["7"], "filter": "strict-match", "exact_match": 1.0}\n',
        ],
        "profile": [
            path.read_bytes().replace(f'"{path.stem}"'.encode(), b'"board"', 1)
            for path in sorted(profile_folder().glob("*.toml"))
        ],
        "recipe": [b'name = "m"\n[quantizer]\nuse = "rtn"\nbits = 4\n[[adapters]]\npath = "a"\n'],
        "configuration": [b'{"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}}'],
        "tokenizer": [b'{"chat_template": "{{ x }}", "bos_token": "<s>", "eos_token": {"content": "</s>"}}'],
        "recording_csv": [b"time_s,rail:power:package:total,t:temperature\n0.0,1.5,40\n0.1,,41\n"],
        "recording_json": [
            b'{"channels": [{"name": "rail", "quantity": "power", "unit": "W", "source": "s", "meaning": "package", '
            b'"total": true}], "times_s": [0.0, 0.1], "values": [[1.0, null]]}'
        ],
        "announcement": [b"id-1\0board\x001.0\x001\0ab12"],
        "counters": [
            b"cpu  1 2 3 4 5 6 7 8 9 10\n",
            b"1 (a (b) c) R 1 1 1 1 1 1 1 1 1 1 5 7 0 0\n",
            b"some avg10=0.00 avg60=0.00 avg300=0.00 total=17\n",
            b"42500\n",
        ],
        "words": [
            f"jmc.{'a' * 22}.{'b' * 43}\n{enrolment_key}\n32768K\n0-3,8\nhttps://192.168.1.10:8443".encode(),
            b"x\ny\n1M\n2\nhttp://[::1]:80/",
        ],
    }


def _pack(wire: Mapping[str, bytes]) -> bytes:
    pack = TaskPack.model_validate_json(wire["TaskPack"])
    return canonical_json(pack.model_copy(update={"task_hash": packs.task_hash(pack.items, 1)}))


def _signed(wire: Mapping[str, bytes]) -> Envelope:
    return KEY.sign(FetchOrder.model_validate_json(wire["FetchOrder"]))


def _evidence(wire: Mapping[str, bytes]) -> bytes:
    envelope = _signed(wire)
    names = {"device": envelope, "artifact": envelope, "run": envelope, "signature": envelope}
    pem = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"
    host = HostFacts(authority_pem=pem, signing_key=KEY.public, version="1")
    return Evidence(host=host, record="", **names).model_dump_json(by_alias=True).encode()


def _record() -> RunRecord:
    """A short one: two items, a sample every five seconds."""
    return records.make_record(items=records.make_items(size=2, correct=1), trace=records.make_trace(interval_s=5.0))


def _tiny() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return gguf_files.write_tiny(Path(folder) / "tiny.gguf").read_bytes()


def _graph() -> bytes:
    inside = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])
    outside = TensorProto(name="v", data_type=TensorProto.FLOAT, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "model.onnx.data", "offset": "0", "length": "16"}.items():
        outside.external_data.add(key=key, value=value)
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    nodes = [helper.make_node("Add", ["w", "v"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "g", [], [value], [inside, outside])).SerializeToString()
