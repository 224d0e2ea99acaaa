"""lm-eval's files made from our record, read back, and compared item by item with planted differences."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from joulemark import comparison, lmeval, packs, samples
from joulemark.documents import Documents
from joulemark.errors import BadInput, NotFound, PackRejected
from joulemark.grading import Outcome
from joulemark.samples import Sample
from joulemark.wire import Absent, Dataset, ItemRecord, Problem, RunRecord, TaskPack, content_id
from tests.fixtures.records import make_record

DATASET = Dataset(name="invented", split="test", source="tests", sha256="0" * 64)


def choice_pack(size: int = 40) -> TaskPack:
    docs = tuple(
        {"id": f"d{n}", "question": f"What is {n}?", "choices": {"text": ["no", f"number {n}", "perhaps"]}, "gold": 1}
        for n in range(size)
    )
    train = Absent(reason="none")
    return packs.render("arc_easy", Documents("arc_easy", "test", docs, "", DATASET, train))


def number_pack(size: int = 40) -> TaskPack:
    docs = tuple({"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(size))
    return packs.render("gsm8k_cot", Documents("gsm8k", "test", docs, "", DATASET, Absent(reason="none")))


def outcome(pack: TaskPack, n: int) -> Outcome:
    """Right on every document but each fourth."""
    if pack.kind == "choice":
        return Outcome(choice_logprobs=(-9.25, -4.5 if n % 4 else -99.0, -30.125 - n))
    return Outcome(output=f" It is so. The answer is {n if n % 4 else n + 1}.")


def run(pack: TaskPack, **changes: Any) -> RunRecord:
    module = packs.task_module(pack)
    answered: list[ItemRecord] = []
    for item in pack.items:
        given = outcome(pack, item.doc_id)
        answered.append(
            ItemRecord(
                doc_id=item.doc_id,
                prompt_sha256=packs.prompt_sha256(item),
                end_s=1011.0,
                output=given.output,
                choice_logprobs=given.choice_logprobs,
                choice_greedy=(False, item.doc_id == 1, False) if given.choice_logprobs else None,
                grade=module.grade(item, given),
            )
        )
    fields = {"pack": packs.header(pack, content_id(pack)), "items": tuple(answered), **changes}
    return make_record(**fields)


def parsed(record: RunRecord, pack: TaskPack) -> tuple[Sample, ...]:
    return tuple(samples.parse(line) for line in lmeval.sample_lines(record, pack))


@pytest.fixture(params=["choice", "numbers"])
def pack(request: pytest.FixtureRequest) -> TaskPack:
    return choice_pack() if request.param == "choice" else number_pack()


def test_choice_sample_lines_have_lm_evals_form() -> None:
    pack = choice_pack()
    line = lmeval.sample_lines(run(pack), pack)[1]
    assert line == {
        "doc_id": 1,
        "doc": pack.items[1].doc,
        "target": "1",
        "arguments": {
            "gen_args_0": {"arg_0": "Question: What is 1?\nAnswer:", "arg_1": " no"},
            "gen_args_1": {"arg_0": "Question: What is 1?\nAnswer:", "arg_1": " number 1"},
            "gen_args_2": {"arg_0": "Question: What is 1?\nAnswer:", "arg_1": " perhaps"},
        },
        "resps": [[["-9.25", "False"]], [["-4.5", "True"]], [["-31.125", "False"]]],
        "filtered_resps": [["-9.25", "False"], ["-4.5", "True"], ["-31.125", "False"]],
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "doc_hash": pack.items[1].doc_sha256,
        "prompt_hash": packs.text_sha256("Question: What is 1?\nAnswer:"),
        "target_hash": packs.text_sha256("1"),
        "acc": 1.0,
        "acc_norm": 1.0,
    }


def test_unknown_greediness_is_none_not_false() -> None:
    pack = choice_pack(2)
    record = run(pack)
    bare = tuple(item.model_copy(update={"choice_greedy": None}) for item in record.items)
    line = lmeval.sample_lines(record.model_copy(update={"items": bare}), pack)[0]
    assert line["filtered_resps"][0] == ["-9.25", "None"]


def test_generation_sample_lines_come_filter_by_filter() -> None:
    pack = number_pack(3)
    lines = lmeval.sample_lines(run(pack), pack)
    assert [(line["filter"], line["doc_id"]) for line in lines] == [
        *(("strict-match", n) for n in range(3)),
        *(("flexible-extract", n) for n in range(3)),
    ]
    line = lines[3]
    assert line["resps"] == [[" It is so. The answer is 1."]]
    assert line["filtered_resps"] == ["1."]
    assert line["metrics"] == ["exact_match"]
    assert line["exact_match"] == 0.0
    assert line["arguments"]["gen_args_0"]["arg_1"]["until"] == ["Q:", "</s>", "<|im_end|>"]


def test_results_hold_scores_errors_and_the_task_hash(pack: TaskPack) -> None:
    results = lmeval.results(run(pack), pack)
    scores = results["results"][pack.task]
    name = "acc,none" if pack.kind == "choice" else "exact_match,strict-match"
    assert scores[name] == 0.75
    deviation = math.sqrt((30 * 0.25**2 + 10 * 0.75**2) / 39)
    metric, filter_name = name.split(",")
    assert scores[f"{metric}_stderr,{filter_name}"] == pytest.approx(deviation / math.sqrt(40), rel=1e-12)
    assert results["task_hashes"] == {pack.task: pack.task_hash}
    assert results["n-samples"] == {pack.task: {"original": 40, "effective": 40}}
    assert results["versions"] == {pack.task: 1.0 if pack.kind == "choice" else 3.0}
    assert json.loads(json.dumps(results)) == results


def test_items_without_a_grade_are_counted_not_scored() -> None:
    pack = choice_pack()
    record = run(pack)
    problem = Problem(code="prompt_too_long", message="too long")
    items = tuple(
        item.model_copy(update={"grade": None, "choice_logprobs": None, "problem": problem})
        if item.doc_id < 4
        else item
        for item in record.items[:20]
    )
    results = lmeval.results(record.model_copy(update={"items": items}), pack)
    assert results["n-samples"]["arc_easy"] == {"original": 40, "effective": 16}
    assert results["joulemark"]["items_without_grade"] == 4
    assert results["results"]["arc_easy"]["acc,none"] == 12 / 16
    assert results["task_hashes"]["arc_easy"] == packs.task_hash(pack.items[4:20], 1)


def test_one_item_has_no_standard_error() -> None:
    pack = choice_pack(1)
    assert lmeval.results(run(pack), pack)["results"]["arc_easy"]["acc_stderr,none"] == "N/A"
    assert lmeval.standard_error([1.0]) is None


def test_a_record_of_another_pack_is_refused() -> None:
    pack = choice_pack()
    record = run(pack)
    with pytest.raises(BadInput, match="not with this one"):
        lmeval.sample_lines(record, number_pack())
    changed = (record.items[0].model_copy(update={"prompt_sha256": "0" * 64}), *record.items[1:])
    with pytest.raises(BadInput, match="document 0"):
        lmeval.sample_lines(record.model_copy(update={"items": changed}), pack)
    with pytest.raises(PackRejected):
        other = pack.model_copy(update={"version": "9"})
        lmeval.sample_lines(record, other)


def test_files_round_trip(pack: TaskPack, tmp_path: Path) -> None:
    record = run(pack)
    results_path, samples_path = lmeval.write(record, pack, tmp_path / "out")
    assert results_path.name == "results_2026-05-28T20-26-40.000000.json"
    assert samples_path.name == f"samples_{pack.task}_2026-05-28T20-26-40.000000.jsonl"
    assert json.loads(results_path.read_text()) == lmeval.results(record, pack)
    assert samples.read_samples(samples_path) == parsed(record, pack)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_the_same_samples_are_identical(pack: TaskPack) -> None:
    ours = parsed(run(pack), pack)
    found = comparison.compare(ours, ours)
    assert (found.verdict, found.shared, found.compared, found.differences) == ("identical", 40, 40, ())
    assert found.logprob_max == (0.0 if pack.kind == "choice" else None)
    assert all(pair.n == 40 and pair.ours == pair.theirs == 0.75 for pair in found.scores)


def choice_samples() -> list[Sample]:
    pack = choice_pack()
    return list(parsed(run(pack), pack))


def test_a_planted_flip_is_found() -> None:
    ours, theirs = choice_samples(), choice_samples()
    theirs[5] = replace(theirs[5], logprobs=(-4.0, -4.5, -40.0), scores={"acc": 0.0, "acc_norm": 1.0})
    found = comparison.compare(ours, theirs)
    assert next((d.doc_id, d.what, d.ours, d.theirs) for d in found.differences) == (5, "acc", "1", "0")
    assert found.differing("acc") == 1
    assert found.verdict == "equivalent"
    assert found.logprob_max == pytest.approx(5.25)
    assert found.logprob_mean == pytest.approx((5.25 + 40.0 - 35.125) / 120)
    (acc, _) = found.scores
    assert (acc.name, acc.ours, acc.theirs) == ("acc,none", 0.75, 29 / 40)
    assert acc.agrees


@pytest.mark.parametrize("mine, other", [(0, 2), (2, 0), (1, 2)])
def test_a_flip_is_found_in_either_direction(mine: int, other: int) -> None:
    def chosen(index: int) -> tuple[float, ...]:
        return tuple(-1.0 if place == index else -90.0 for place in range(3))

    ours, theirs = choice_samples(), choice_samples()
    ours[9], theirs[9] = replace(ours[9], logprobs=chosen(mine)), replace(theirs[9], logprobs=chosen(other))
    found = comparison.compare(ours, theirs)
    assert [(d.doc_id, d.what, d.ours, d.theirs) for d in found.differences] == [
        (9, "acc", str(mine), str(other)),
        (9, "acc_norm", str(mine), str(other)),
    ]


def test_many_flips_are_different() -> None:
    ours, theirs = choice_samples(), choice_samples()
    for place in range(1, 40, 2):
        theirs[place] = replace(theirs[place], logprobs=(-1.0, -4.5, -40.0), scores={"acc": 0.0, "acc_norm": 0.0})
    found = comparison.compare(ours, theirs)
    assert found.verdict == "different"
    assert any("acc,none" in reason for reason in found.reasons)
    assert any("50.0%" in reason for reason in found.reasons)


def test_logprobs_per_token_decide_where_tokens_are_known() -> None:
    ours = choice_samples()
    theirs = [replace(s, logprobs=tuple(value + 0.002 for value in s.logprobs or ())) for s in ours]
    assert comparison.compare(ours, theirs).verdict == "equivalent"
    known = comparison.compare(ours, theirs, tokens={s.doc_id: (4, 4, 4) for s in ours})
    assert known.logprob_max_per_token == pytest.approx(0.0005)
    assert known.verdict == "identical"


def test_a_changed_prompt_makes_it_not_comparable() -> None:
    ours, theirs = choice_samples(), choice_samples()
    theirs[7] = replace(theirs[7], prompt_sha256="0" * 64)
    found = comparison.compare(ours, theirs)
    assert found.verdict == "not comparable"
    assert (found.shared, found.compared, found.differing("prompt")) == (40, 39, 1)
    assert found.scores[0].n == 39


@pytest.mark.parametrize("change", [{"target": "0"}, {"choices": ("no", "yes", "perhaps")}, {"logprobs": None}])
def test_changed_targets_and_choices_make_it_not_comparable(change: dict[str, Any]) -> None:
    ours, theirs = choice_samples(), choice_samples()
    theirs[7] = replace(theirs[7], **change)
    assert comparison.compare(ours, theirs).verdict == "not comparable"


def test_documents_missing_on_a_side_are_named_and_left_out() -> None:
    found = comparison.compare(choice_samples()[:30], choice_samples()[10:])
    assert found.only_ours == tuple(range(10))
    assert found.only_theirs == tuple(range(30, 40))
    assert (found.shared, found.scores[0].n, found.verdict) == (20, 20, "identical")
    nothing = comparison.compare(choice_samples()[:10], choice_samples()[10:])
    assert nothing.verdict == "not comparable"


def test_a_changed_output_and_answer_are_found_per_filter() -> None:
    pack = number_pack()
    ours = list(parsed(run(pack), pack))
    theirs = [
        replace(s, output=" other", answer="[invalid]") if s.doc_id == 2 and s.filter == "strict-match" else s
        for s in ours
    ]
    found = comparison.compare(ours, theirs)
    assert [(d.doc_id, d.what) for d in found.differences] == [(2, "output"), (2, "answer strict-match")]
    assert found.verdict == "equivalent"


def test_files_of_different_kinds_share_no_filter() -> None:
    pack = number_pack()
    with pytest.raises(BadInput, match="filter"):
        comparison.compare(choice_samples(), parsed(run(pack), pack))


OLD = {  # lm-eval before 0.4.4: no filter, no hashes, numbers instead of text, lists instead of dictionaries
    "doc_id": 0,
    "doc": {},
    "target": 1,
    "arguments": [["Question: What is 0?\nAnswer:", " no"], ["Question: What is 0?\nAnswer:", " yes"]],
    "resps": [[[-3.5, False]], [[-2.5, True]]],
    "filtered_resps": [[-3.5, False], [-2.5, True]],
    "acc": 1.0,
    "acc_norm": 0.0,
}


def test_older_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(OLD) + "\n\n" + json.dumps({**OLD, "doc_id": 1}))
    first, second = samples.read_samples(path)
    assert first.logprobs == (-3.5, -2.5)
    assert first.choices == ("no", "yes")
    assert (first.filter, first.target, first.scores) == ("none", "1", {"acc": 1.0, "acc_norm": 0.0})
    assert first.prompt_sha256 == packs.text_sha256("Question: What is 0?\nAnswer:")
    assert second.doc_id == 1


def old(**changes: Any) -> bytes:
    return json.dumps({**OLD, **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n\n",
        b"\xff\xfe",
        b"{}",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"9" * 10_000,
        old() + b"\n" + old(),
        old(doc_id="0"),
        old(doc_id=True),
        old(doc_id=-1),
        old(resps=[]),
        old(resps=[[[-3.5, False]]]),
        old(resps=[[[-3.5, False], [-3.5, False]], [[-2.5, True]]]),
        old(resps=[[["nan", "False"]], [["-2.5", "True"]]]),
        old(resps=[[["-inf", "False"]], [["-2.5", "True"]]]),
        old(resps=["x", "y"]),
        old(resps=[[[]], [[]]]),
        old(arguments={"gen_args_5": {"arg_0": "a", "arg_1": "b"}}),
        old(arguments={}),
        old(arguments=[[1, 2], [3, 4]]),
        old(arguments="text"),
        old(acc="high"),
        old(acc=math.nan),
        old(metrics=["missing"]),
        old(metrics=[["acc"]]),
        old(filter=5),
        old(filter={"a": 1}),
        old(filtered_resps=7, arguments=[["p", {"until": []}]], resps=[["x"]]),
        old(arguments=[["p", {"until": []}]], resps=[[5]]),
    ],
)
def test_files_that_are_not_samples_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(data)
    with pytest.raises(BadInput):
        samples.read_samples(path)


def test_absurd_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.jsonl"
    with path.open("wb") as file:
        file.truncate(samples.MAX_LINE_BYTES + 2)
    with pytest.raises(BadInput, match="line 1"):
        samples.read_samples(path)
    path.write_bytes(b"".join(old(doc_id=n) + b"\n" for n in range(50)))
    monkeypatch.setattr(samples, "MAX_FILE_BYTES", 1000)
    with pytest.raises(BadInput, match="too large"):
        samples.read_samples(path)
    with pytest.raises(NotFound):
        samples.read_samples(tmp_path / "none.jsonl")
    with pytest.raises(BadInput):
        samples.read_samples(tmp_path)
