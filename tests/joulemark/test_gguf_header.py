"""The GGUF pre-flight check: what it reads, what it refuses, and that neither takes long or much memory."""

from __future__ import annotations

import hashlib
import os
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joulemark import gguf_header, sources
from joulemark.errors import ModelRejected
from joulemark.gguf_format import TENSOR_TYPES
from joulemark.gguf_header import ArraySummary, Header, read_header
from tests.fixtures import gguf_files

HOSTILE = gguf_files.hostile()
# A file that holds the allowed million strings takes longest: a real vocabulary of that size cannot be told from it.
SLOW = {"strings_2_million": 0.6}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_tiny_model_is_read_exactly(tiny: Path) -> None:
    header = read_header(tiny)
    assert header.version == 3
    assert header.architecture == "llama"
    assert header.quantization == "Q8_0"
    assert header.context_tokens == 128
    assert header.block_count == 2
    assert header.licence == "apache-2.0"
    assert header.chat_template == "{{ messages[0]['content'] }}"
    assert header.metadata["tokenizer.ggml.tokens"] == ArraySummary("string", 64)
    embedding, block = 64 * 32, 32 + 48 * 32
    assert header.parameters == 2 * embedding + 2 * block + 32
    q8 = 34 / 32
    assert header.weight_bytes == 2 * embedding * q8 + 2 * (32 * 4 + 48 * 32 * q8) + 32 * 4
    assert header.bytes_per_token == header.weight_bytes - embedding * q8
    first = header.tensors[0]
    assert (first.name, first.shape, first.type_name, first.size_bytes) == ("token_embd.weight", (32, 64), "Q8_0", 2176)
    assert first.offset % 32 == 0
    assert header.tensors[-1].offset + header.tensors[-1].size_bytes <= tiny.stat().st_size


def test_tied_embedding_is_read_as_the_head(tmp_path: Path) -> None:
    header = read_header(gguf_files.write_tiny(tmp_path / "tied.gguf", tied=True))
    assert header.bytes_per_token == header.weight_bytes


def test_experts_have_no_known_bytes_per_token(tmp_path: Path) -> None:
    path = tmp_path / "experts.gguf"
    path.write_bytes(gguf_files.whole(gguf_files.llama(), [gguf_files.tensor("blk.0.ffn_up_exps.weight", (32,))]))
    header = read_header(path)
    assert header.bytes_per_token is None
    assert header.weight_bytes == 128


def test_quantization_falls_back_to_the_type_with_most_bytes(tmp_path: Path) -> None:
    tensors = [gguf_files.tensor("blk.0.a", (32,)), gguf_files.tensor("blk.0.b", (32, 64), kind=2, offset=128)]
    path = tmp_path / "plain.gguf"
    path.write_bytes(gguf_files.whole(gguf_files.llama(), tensors))
    assert read_header(path).quantization == "Q4_0"


def test_tokenizer_hash_covers_the_raw_entries_and_nothing_else(tmp_path: Path) -> None:
    tokens = gguf_files.array(
        "tokenizer.ggml.tokens", gguf_files.STRING, 2, gguf_files.text("a") + gguf_files.text("b")
    )
    model = gguf_files.words("tokenizer.ggml.model", "gpt2")
    between = gguf_files.words("general.name", "x")
    path = tmp_path / "tokenizer.gguf"
    path.write_bytes(gguf_files.whole(gguf_files.llama(model, between, tokens)))
    assert read_header(path).tokenizer_sha256 == hashlib.sha256(model + tokens).hexdigest()
    path.write_bytes(gguf_files.whole(gguf_files.llama()))
    assert read_header(path).tokenizer_sha256 is None


def test_an_array_longer_than_the_read_buffer_is_stepped_over_exactly(tmp_path: Path) -> None:
    strings = [f"word{number:05d}" * (1 + number % 40) for number in range(30_000)]
    tokens = gguf_files.array(
        "tokenizer.ggml.tokens", gguf_files.STRING, len(strings), b"".join(gguf_files.text(word) for word in strings)
    )
    path = tmp_path / "long.gguf"
    path.write_bytes(gguf_files.whole(gguf_files.llama(tokens, gguf_files.words("general.license", "mit"))))
    header = read_header(path)
    assert path.stat().st_size > 5 << 20
    assert header.licence == "mit"
    assert header.tokenizer_sha256 == hashlib.sha256(tokens).hexdigest()


def test_the_tensor_types_are_those_of_the_gguf_package() -> None:
    theirs = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    theirs[9] = ("Q8_1", 32, 36)  # ggml-common.h: two halves and 32 bytes; the package's 40 dates from two floats
    assert {number: TENSOR_TYPES.get(number) for number in theirs} == theirs


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_file_is_rejected_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(HOSTILE[name])
    times: list[float] = []
    for _ in range(3):  # the best of three: the machine may be busy
        begin = time.perf_counter()
        with pytest.raises(ModelRejected) as caught:
            read_header(path)
        times.append(time.perf_counter() - begin)
    assert caught.value.hint
    assert min(times) < SLOW.get(name, 0.1)
    tracemalloc.start()
    with pytest.raises(ModelRejected):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_the_largest_acceptable_header_stays_small(tmp_path: Path) -> None:
    tensors = [gguf_files.tensor(f"blk.0.{number:050d}", (8, 1, 1, 1), offset=32 * number) for number in range(1 << 14)]
    entries = [gguf_files.number(f"{number:0200d}", number) for number in range(16_000)]
    filler = gguf_files.array("a", gguf_files.STRING, 1 << 20, gguf_files.text(b"word") * (1 << 20))
    wide = gguf_files.words("b", "\N{GRINNING FACE}" + "x" * 500_000)
    path = tmp_path / "largest.gguf"
    path.write_bytes(gguf_files.whole([*gguf_files.llama(*entries, filler, wide)], tensors, data=32 << 14))
    tracemalloc.start()
    header = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(header.tensors) == 1 << 14
    assert peak < 50e6
    begin = time.perf_counter()
    read_header(path)
    assert time.perf_counter() - begin < 2.0


def test_every_hostile_file_is_one_flaw_away_from_a_good_one(tmp_path: Path) -> None:
    """The frame that most of the hostile files are built in is accepted, so each is rejected for its own flaw."""
    path = tmp_path / "frame.gguf"
    path.write_bytes(gguf_files.whole(gguf_files.llama()))
    assert read_header(path).block_count == 1


@pytest.mark.parametrize(
    "reason, name",
    [
        ("twice", "key_twice"),
        ("more than the file can hold", "array_of_strings_2_61"),
        ("more than 1048576 strings", "strings_2_million"),
        ("keys have more than", "keys_64k"),
        ("2147483648", "alignment_2g"),
        ("uint32", "alignment_type"),
        ("uint32", "blocks_signed"),
        ("block_count is 2", "blocks_2_for_1"),
        ("expected 128", "tensors_overlap"),
        ("beyond the end", "tensor_beyond_end"),
        ("token_type", "token_type_bytes"),
        ("1 entries for 2 tokens", "token_type_count"),
        ("not UTF-8", "template_latin"),
        ("allowed are 1 to", "context_2_31"),
        ("big-endian", "big_endian"),
        ("cannot have", "elements_zero"),
        ("cannot have", "tensor_row"),
    ],
)
def test_the_reason_names_the_flaw(name: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ModelRejected, match=reason):
        read_header(path)


def test_every_truncation_of_a_good_file_is_rejected(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    last = read_header(tiny).tensors[-1]
    end = last.offset + last.size_bytes
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 7), *range(3000, end, 501), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelRejected):
            read_header(path)


@pytest.mark.parametrize("key, value", [("llama.block_count", 100_000), ("llama.context_length", 0x7FFFFFFF)])
def test_patched_numbers_are_rejected(key: str, value: int, tiny: Path, tmp_path: Path) -> None:
    data = bytearray(tiny.read_bytes())
    struct.pack_into("<I", data, data.find(key.encode()) + len(key) + 4, value)
    path = tmp_path / "patched.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelRejected, match=key):
        read_header(path)


def test_an_evil_template_is_only_text_here(tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + "{% for i in x %}" * 10_000
    path = tmp_path / "template.gguf"
    path.write_bytes(gguf_files.whole(gguf_files.llama(gguf_files.words("tokenizer.chat_template", template))))
    assert read_header(path).chat_template == template


def test_things_that_are_not_files_are_rejected(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, tmp_path / "missing.gguf", Path("nul\0byte.gguf"), Path("/dev/zero")):
        with pytest.raises(ModelRejected):
            read_header(path)


def test_a_string_beyond_the_budget_is_only_summarised(tmp_path: Path) -> None:
    size = 3 << 20
    path = tmp_path / "strings.gguf"
    path.write_bytes(gguf_files.whole(gguf_files.llama(*(gguf_files.words(f"x{n}", b"x" * size) for n in range(3)))))
    metadata = read_header(path).metadata
    assert metadata["x0"] == "x" * size
    assert metadata["x1"] == metadata["x2"] == ArraySummary("utf8", size)


def test_a_file_that_shrinks_while_it_is_read_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shrinking.gguf"
    path.write_bytes(gguf_files.whole(gguf_files.llama(gguf_files.words("general.name", b"x" * (2 << 20)))))
    real = os.pread

    def pread(descriptor: int, count: int, offset: int) -> bytes:
        os.truncate(path, 1 << 19)
        return real(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(ModelRejected, match="shorter"):
        read_header(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_a_header_or_a_rejection(data: st.DataObject, tiny: Path, tmp_path: Path) -> None:
    content = bytearray(tiny.read_bytes())
    limit = read_header(tiny).tensors[0].offset
    for place in data.draw(st.lists(st.integers(0, limit - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    begin = time.perf_counter()
    try:
        header = read_header(path)
    except ModelRejected:
        pass
    else:
        assert isinstance(header, Header)
        assert all(t.offset + t.size_bytes <= len(content) for t in header.tensors)
    assert time.perf_counter() - begin < 1.0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=400))
def test_arbitrary_bytes_after_the_magic_are_rejected(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "arbitrary.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
    with pytest.raises(ModelRejected):
        read_header(path)


def test_the_real_model_is_read_exactly_and_fast() -> None:
    path = sources.fetch("smollm2-135m-instruct-q4_1", sources.default_cache())
    times: list[float] = []
    for _ in range(3):
        begin = time.perf_counter()
        header = read_header(path)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.25
    assert header.architecture == "llama"
    assert header.quantization == "Q4_1"
    assert header.parameters == 134_515_008
    assert header.block_count == 30
    assert header.context_tokens == 8192
    assert len(header.tensors) == 272
    assert header.bytes_per_token == header.weight_bytes == 96_576_768
    assert header.tensors[-1].offset + header.tensors[-1].size_bytes == path.stat().st_size
    assert header.licence == "apache-2.0"
    assert isinstance(header.metadata["tokenizer.ggml.tokens"], gguf_header.ArraySummary)
