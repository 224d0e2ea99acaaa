"""lm-eval's result and sample files, made from our record, so that its viewers and comparison scripts read our runs.

Owns the translation of one RunRecord and its TaskPack into `results_<time>.json` and `samples_<task>_<time>.jsonl`. All
but `write` is pure. It is not aware of engines or of other people's files: see `joulemark.samples` and
`joulemark.comparison`.

Form: lm-evaluation-harness 0.4.13 (loggers/evaluation_tracker.py, evaluator.py). As there, everything inside `resps`
and `filtered_resps` is text, and `arguments` is a dictionary of dictionaries. Where our record does not know whether a
choice was the greedy continuation, "None" is written: lm-eval's readers look at the log-probability only. Items without
a grade have no line; `joulemark.items_without_grade` in the results counts them. Standard errors: sample stddev ÷ √n.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from joulemark import durable, packs
from joulemark.errors import BadInput
from joulemark.wire import Grade, ItemRecord, PackItem, RunRecord, TaskPack


def sample_lines(record: RunRecord, pack: TaskPack) -> list[dict[str, Any]]:
    """One dictionary per filter and graded document, in the pack's order.

    Raises BadInput when the record does not belong to the pack.
    """
    answered = _graded(record, pack)
    return [
        _line(pack, item, answer, filter_name)
        for filter_name in packs.task_module(pack).FILTERS
        for item, answer in answered
    ]


def results(record: RunRecord, pack: TaskPack) -> dict[str, Any]:
    """What lm-eval writes as `results_<time>.json`. The task hash covers the documents of this run, as lm-eval's
    does."""
    lines = sample_lines(record, pack)
    task = pack.task
    graded = len(_graded(record, pack))
    metrics = sorted({metric for line in lines for metric in line["metrics"]})
    hashes = "".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines)
    return {
        "results": {task: {"alias": task, "sample_len": graded, **_scores(lines)}},
        "group_subtasks": {},
        "configs": {task: _task_config(pack, metrics)},
        "versions": {task: _version(pack.version)},
        "n-shot": {task: pack.shots},
        "higher_is_better": {task: dict.fromkeys(metrics, True)},
        "n-samples": {task: {"original": len(pack.items), "effective": graded}},
        "config": _config(record),
        "git_hash": None,
        "date": record.clock.wall_s,
        "task_hashes": {task: packs.text_sha256(hashes)},
        **_model(record, pack),
        "joulemark": {
            "run_id": record.spec.run_id,
            "status": record.status,
            "pack_id": record.pack.pack_id,
            "pack_task_hash": pack.task_hash,
            "items_without_grade": len(record.items) - graded,
            "valid": record.verdict.valid,
            "reasons": list(record.verdict.reasons),
        },
    }


def write(record: RunRecord, pack: TaskPack, folder: Path) -> tuple[Path, Path]:
    """Writes both files into `folder` and returns their paths. The time in their names is when the run began (UTC)."""
    stamp = datetime.fromtimestamp(record.clock.wall_s, timezone.utc).strftime("%Y-%m-%dT%H-%M-%S.%f")
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in sample_lines(record, pack)]
    summary = json.dumps(results(record, pack), indent=2, ensure_ascii=False)
    results_path, samples_path = folder / f"results_{stamp}.json", folder / f"samples_{pack.task}_{stamp}.jsonl"
    durable.replace_file(samples_path, (line.encode() for line in lines))
    durable.replace_file(results_path, [summary.encode()])
    return results_path, samples_path


def standard_error(values: Sequence[float]) -> float | None:
    """Sample standard deviation ÷ √n, as lm-eval's `mean_stderr`; None for fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1)) / math.sqrt(count)


def _graded(record: RunRecord, pack: TaskPack) -> list[tuple[PackItem, ItemRecord]]:
    if record.pack.task_hash != pack.task_hash or record.pack.task != pack.task:
        raise BadInput(
            f"the record of run {record.spec.run_id} was made with the pack {record.pack.pack_id}, not with this one",
            "give the pack that the record names",
        )
    items = {item.doc_id: item for item in pack.items}
    answers = {answer.doc_id: answer for answer in record.items}
    for doc_id, answer in answers.items():
        if doc_id not in items or packs.prompt_sha256(items[doc_id]) != answer.prompt_sha256:
            raise BadInput(
                f"document {doc_id} of run {record.spec.run_id} had another prompt than the pack has",
                "the record was damaged: run the evaluation again",
            )
    return [
        (item, answers[item.doc_id])
        for item in pack.items
        if item.doc_id in answers and answers[item.doc_id].grade is not None
    ]


def _line(pack: TaskPack, item: PackItem, answer: ItemRecord, filter_name: str) -> dict[str, Any]:
    if answer.grade is None:
        raise BadInput(f"document {item.doc_id} has no grade", "leave it out")
    resps, filtered = _responses(pack, item, answer, answer.grade, filter_name)
    metrics = {
        name.partition(",")[0]: score
        for name, score in answer.grade.scores.items()
        if (name.partition(",")[2] or "none") == filter_name
    }
    return {
        "doc_id": item.doc_id,
        "doc": item.doc,
        "target": item.target,
        "arguments": {f"gen_args_{place}": pair for place, pair in enumerate(_arguments(pack, item))},
        "resps": resps,
        "filtered_resps": filtered,
        "filter": filter_name,
        "metrics": list(metrics),
        "doc_hash": packs.doc_sha256(item),
        "prompt_hash": packs.prompt_sha256(item),
        "target_hash": packs.target_sha256(item),
        **metrics,
    }


def _arguments(pack: TaskPack, item: PackItem) -> Iterator[dict[str, Any]]:
    if pack.generation is None:
        for choice in item.choices:
            yield {"arg_0": item.prompt, "arg_1": f" {choice}"}
        return
    settings = {
        "until": list(pack.generation.stop),
        "do_sample": False,
        "temperature": 0.0,
        "max_gen_toks": pack.generation.max_new_tokens,
    }
    yield {"arg_0": item.prompt, "arg_1": settings}


def _responses(
    pack: TaskPack, item: PackItem, answer: ItemRecord, grade: Grade, filter_name: str
) -> tuple[list[Any], list[Any]]:
    if pack.kind == "generation":
        return [[answer.output]], [grade.answers[filter_name]]
    logprobs = answer.choice_logprobs or ()
    greedy = answer.choice_greedy or (None,) * len(logprobs)
    if not len(logprobs) == len(greedy) == len(item.choices):
        raise BadInput(f"document {item.doc_id} has a grade but not all its log-probabilities", "run it again")
    filtered = [[str(value), str(flag)] for value, flag in zip(logprobs, greedy, strict=True)]
    return [[pair] for pair in filtered], filtered


def _scores(lines: Sequence[dict[str, Any]]) -> dict[str, float | str]:
    values: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        for metric in line["metrics"]:
            values.setdefault((metric, line["filter"]), []).append(line[metric])
    scores: dict[str, float | str] = {}
    for (metric, filter_name), column in values.items():
        error = standard_error(column)
        scores[f"{metric},{filter_name}"] = sum(column) / len(column)
        scores[f"{metric}_stderr,{filter_name}"] = "N/A" if error is None else error
    return scores


def _task_config(pack: TaskPack, metrics: Sequence[str]) -> dict[str, Any]:
    generation = pack.generation
    return {
        "task": pack.task,
        "dataset_name": pack.dataset.name,
        "dataset_path": pack.dataset.source,
        "test_split": pack.dataset.split,
        "output_type": "multiple_choice" if generation is None else "generate_until",
        "num_fewshot": pack.shots,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "repeats": 1,
        "metadata": {"version": _version(pack.version)},
        **({} if generation is None else {"generation_kwargs": {"until": list(generation.stop), "do_sample": False}}),
    }


def _config(record: RunRecord) -> dict[str, Any]:
    engine = record.engine
    return {
        "model": "joulemark",
        "model_args": {"pretrained": record.manifest.name, "artifact_id": record.spec.artifact_id},
        "model_num_parameters": record.manifest.parameters,
        "model_dtype": record.manifest.quantization,
        "batch_size": None if engine is None else engine.sequences,
        "device": None if engine is None else engine.device,
        "limit": record.spec.limit,
        "engine": None if engine is None else engine.model_dump(mode="json"),
    }


def _model(record: RunRecord, pack: TaskPack) -> dict[str, Any]:
    begin = min((phase.start_s for phase in record.phases), default=None)
    end = max((phase.end_s for phase in record.phases), default=None)
    return {
        "model_source": "joulemark",
        "model_name": record.manifest.name,
        "model_name_sanitized": record.manifest.name,
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": False if not pack.apply_chat_template else None,
        "chat_template": None,
        "chat_template_sha": record.manifest.chat_template_sha256 if pack.apply_chat_template else None,
        "start_time": begin,
        "end_time": end,
        "total_evaluation_time_seconds": None if begin is None or end is None else str(end - begin),
    }


def _version(text: str) -> float | str:
    """lm-eval's versions are numbers."""
    try:
        return float(text)
    except ValueError:
        return text
