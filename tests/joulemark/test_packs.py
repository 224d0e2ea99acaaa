"""Packs: rendering, the file, and everything that must be refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from joulemark import packs
from joulemark.documents import Documents
from joulemark.errors import NotFound, PackRejected
from joulemark.wire import Absent, Dataset, TaskPack, canonical_json, content_id


def documents() -> Documents:
    docs = tuple(
        {"id": f"doc {n}", "question": f"What is {n}?", "choices": {"text": ["nought", f"{n}", "é"]}, "gold": 1}
        for n in range(5)
    )
    dataset = Dataset(name="invented", split="test", source="tests", sha256="0" * 64)
    return Documents(
        name="arc_challenge", split="test", docs=docs, context="Question: Who?\nAnswer: I\n\n", dataset=dataset,
        train=Absent(reason="none"),
    )  # fmt: skip


def gsm8k() -> Documents:
    rows = tuple({"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(9))
    dataset = Dataset(name="gsm8k", split="test", source="tests", sha256="0" * 64)
    return Documents(name="gsm8k", split="test", docs=rows, context="", dataset=dataset, train=rows)


@pytest.fixture
def pack() -> TaskPack:
    return packs.render("arc_challenge", documents())


def changed(pack: TaskPack, change: Any) -> bytes:
    """The canonical JSON of `pack` after `change` was applied to its plain form."""
    plain = pack.model_dump(mode="json")
    change(plain)
    return canonical_json(plain)


def test_render_and_header(pack: TaskPack) -> None:
    assert [item.prompt for item in pack.items] == [f"Question: What is {n}?\nAnswer:" for n in range(5)]
    assert pack.items[2].choices == ("nought", "2", "é")
    assert pack.items[2].target == "1"
    assert (pack.version, pack.kind, pack.shots, pack.generation) == ("1.0", "choice", 0, None)
    header = packs.header(pack, content_id(pack))
    assert (header.size, header.task, header.pack_id) == (5, "arc_challenge", content_id(pack))
    olmes = packs.render("arc_challenge_olmes", documents())
    assert olmes.items[0].prompt == "Question: Who?\nAnswer: I\n\nQuestion: What is 0?\nAnswer:"


def test_task_hash_is_lm_evals_recipe(pack: TaskPack) -> None:
    def sha(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    parts = "".join(
        sha(json.dumps(doc, indent=2, ensure_ascii=False)) + sha(f"Question: {doc['question']}\nAnswer:") + sha("1")
        for doc in documents().docs
    )
    assert pack.task_hash == sha(parts)
    assert packs.task_hash(pack.items, 2) == sha(parts * 2)


def test_gsm8k_draws_do_not_depend_on_how_many_documents_are_run() -> None:
    full = packs.render("gsm8k", gsm8k())
    assert full.items[3].prompt.count("Question:") == 6
    assert full.items[3].prompt.endswith("\n\nQuestion: What is 3?\nAnswer:")
    assert len({item.prompt.rpartition("Question:")[0] for item in full.items}) == 9
    assert packs.render("gsm8k", gsm8k()).items[3] == full.items[3]


def test_round_trip(pack: TaskPack, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "pack.json"
    pack_id = packs.write(pack, path)
    assert pack_id == content_id(pack) == hashlib.sha256(path.read_bytes()).hexdigest()
    again = packs.read(path, pack_id)
    assert again == pack
    assert packs.task_hash(again.items, 1) == pack.task_hash
    assert [entry.name for entry in path.parent.iterdir()] == ["pack.json"]


def test_a_failed_write_leaves_the_old_pack_and_no_litter(
    pack: TaskPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pack.json"
    packs.write(pack, path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        packs.write(packs.render("arc_challenge_olmes", documents()), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_pack_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        packs.read(tmp_path / "none.json")
    with pytest.raises(PackRejected):
        packs.read(tmp_path)


def test_the_wrong_id_is_rejected(pack: TaskPack) -> None:
    with pytest.raises(PackRejected, match="expected 1111"):
        packs.parse(canonical_json(pack), "1" * 64)


def test_one_changed_character_is_rejected_by_the_id(pack: TaskPack) -> None:
    data = canonical_json(pack).replace(b"What is 3", b"What is 4")
    with pytest.raises(PackRejected):
        packs.parse(data, content_id(pack))
    with pytest.raises(PackRejected, match="task hash"):
        packs.parse(data)


def duplicate(plain: dict[str, Any]) -> None:
    plain["items"][1]["doc_id"] = 0


def item(**fields: Any):
    def change(plain: dict[str, Any]) -> None:
        plain["items"][2].update(fields)

    return change


def top(**fields: Any):
    def change(plain: dict[str, Any]) -> None:
        plain.update(fields)

    return change


@pytest.mark.parametrize(
    "change, reason",
    [
        (duplicate, "occurs twice"),
        (item(target="3"), "no index"),
        (item(target="-1"), "no index"),
        (item(target="01"), "no index"),
        (item(target="one"), "no index"),
        (item(choices=["only"]), "1 choices"),
        (item(choices=["a"] * 257), "257 choices"),
        (item(choices=["a", ""]), "empty choice"),
        (item(prompt=""), "0 characters"),
        (item(prompt="x" * (packs.MAX_PROMPT_CHARACTERS + 1)), "characters"),
        (item(prompt="Question: another?\nAnswer:"), "task hash"),
        (item(target="2"), "task hash"),
        (item(doc_sha256="0" * 64), "task hash"),
        (item(doc_id=-1), "doc_id"),
        (item(doc_id=1.5), "doc_id"),
        (item(surprise=1), "canonical"),
        (top(surprise=1), "canonical"),
        (top(items=[]), "items"),
        (top(kind="essay"), "kind"),
        (top(kind="generation", generation={"max_new_tokens": 5, "stop": []}), "has choices"),
        (top(generation={"max_new_tokens": 5, "stop": []}), "generation"),
        (top(task_hash="0" * 64), "task hash"),
        (top(task="../../etc/passwd"), "task"),
        (top(schema_number=2), "schema"),
        (top(shots=-1), "shots"),
    ],
)
def test_bad_packs_are_rejected(pack: TaskPack, change: Any, reason: str) -> None:
    with pytest.raises(PackRejected, match=reason):
        packs.parse(changed(pack, change))


@pytest.mark.parametrize(
    "generation, reason",
    [
        (None, "lacks generation"),
        ({"max_new_tokens": 5, "stop": [""]}, "stop"),
        ({"max_new_tokens": 5, "stop": ["x"] * 65}, "stop"),
        ({"max_new_tokens": 0, "stop": []}, "max_new_tokens"),
        ({"max_new_tokens": 10**9, "stop": []}, "max_new_tokens"),
    ],
)
def test_bad_generation_settings_are_rejected(generation: Any, reason: str) -> None:
    with pytest.raises(PackRejected, match=reason):
        packs.parse(changed(packs.render("gsm8k", gsm8k()), top(generation=generation)))


BOMBS = {
    "empty": b"",
    "not_json": b"GGUF\x03\x00",
    "not_utf8": b'{"task": "\xff\xfe"}',
    "surrogate": b'{"task": "\\ud800"}',
    "array": b"[]",
    "number": b"1e999",
    "nan": b'{"schema_number":NaN}',
    "deep": b"[" * 1_000_000,
    "deep_object": b'{"items":' * 200_000,
    "long_number": b'{"schema_number":' + b"9" * 1_000_000 + b"}",
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bombs_are_rejected(name: str) -> None:
    with pytest.raises(PackRejected):
        packs.parse(BOMBS[name])


@pytest.mark.parametrize(
    "inner", [b"[" * 500 + b"]" * 500, b"[" * 50_000 + b"]" * 50_000, b"9" * 10_000, b'"\\ud800"', b"NaN", b"1e999"]
)
def test_bombs_inside_a_document_are_rejected(pack: TaskPack, inner: bytes) -> None:
    data = changed(pack, item(doc={"x": 12345})).replace(b'{"x":12345}', b'{"x":' + inner + b"}")
    with pytest.raises(PackRejected):
        packs.parse(data)


def test_white_space_and_doubled_keys_are_not_canonical(pack: TaskPack) -> None:
    data = canonical_json(pack)
    for other in (data + b"\n", data.replace(b'"shots":0', b'"shots": 0'), b'{"shots":0,' + data[1:]):
        with pytest.raises(PackRejected, match="canonical"):
            packs.parse(other)


def test_an_absurdly_large_file_is_rejected_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pack.json"
    with path.open("wb") as file:
        file.truncate(packs.MAX_PACK_BYTES + 1)
    with pytest.raises(PackRejected, match="larger"):
        packs.read(path)


def test_grading_needs_the_same_version(pack: TaskPack) -> None:
    assert packs.task_module(pack).PRIMARY == "acc_norm"
    with pytest.raises(PackRejected, match=r"grades 1\.0"):
        packs.task_module(pack.model_copy(update={"version": "2.0"}))
    with pytest.raises(NotFound):
        packs.task_module(pack.model_copy(update={"task": "mmlu"}))


def test_a_pack_of_an_unknown_task_can_be_kept(pack: TaskPack) -> None:
    other = pack.model_copy(update={"task": "not_here"})
    assert packs.parse(canonical_json(other)) == other
