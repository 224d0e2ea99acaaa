"""The whole way on a tiny model, and every fault on it: planted, caught, and nothing published."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from joulemark import artifact
from joulemark.errors import BadInput, Conflict, DigestMismatch, EngineFailed, NoSpace
from joulemark_exporter import checkpoint, gguf_tokenizer, pipeline, recipe
from joulemark_exporter.families import llama
from joulemark_exporter.quantizers import gptq
from joulemark_exporter.writers import gguf as writer
from tests.fixtures import hub_models
from tests.fixtures.exporting import quiet, request, train

QUANTIZERS = {
    "none": "use = 'none'\ntype = 'F16'",
    "rtn": "use = 'rtn'",
    "gptq": "use = 'gptq'",
    "kquant": "use = 'kquant'\ntype = 'Q5_0'",
    "lobi": "use = 'lobi'\nbits_per_weight = 6.0\ntypes = ['Q4_0', 'Q5_0', 'Q8_0', 'F16']\nwindows = 1\ntokens = 32",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    hub_models.write(tmp_path / "base", "llama")
    return tmp_path / "base"


def left_over(base: Path) -> list[str]:
    return sorted(path.name for path in base.parent.iterdir() if path.name.startswith("out"))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_whole_way(name: str, base: Path) -> None:
    exported = pipeline.export(request(base, QUANTIZERS[name]), quiet)
    manifest = artifact.verify(exported.folder)
    assert manifest == exported.manifest
    assert manifest.origin is not None
    assert manifest.origin.recipe["quantizer_name"] == name
    assert manifest.origin.steps[0].name == "checkpoint"
    findings = exported.report["findings"]
    # Random weights are hard to quantize; what is right is far from what a fault does (a divergence above 1).
    assert findings["divergence"] < (1e-4 if name == "none" else 0.6)
    assert findings["tokens"] == 96
    assert not list(base.parent.glob(".out*"))
    again = pipeline.export(request(base, QUANTIZERS[name]), quiet)
    assert again.artifact_id == exported.artifact_id


def test_the_memory_that_a_board_needs_is_reckoned_from_the_model(base: Path, tmp_path: Path) -> None:
    """Three layers, two key heads of 16: 192 numbers a position, 256 positions; the weights as they are loaded."""
    numbers = sum(weight.size for weight in checkpoint.open_folder(base).weights.values())
    writer_of = "[writer]\nuse = 'onnx'\nprecision = '{}'\n".format
    cases = [
        ("q4", QUANTIZERS["rtn"], "", None, 2),
        ("f32", "use = 'none'\ntype = 'F32'", "", None, 4),
        ("fp32", "use = 'none'", writer_of("fp32"), 4 * numbers, 4),
        ("fp16", "use = 'none'", writer_of("fp16"), 4 * numbers, 4),
    ]
    for name, quantizer, more, resident, size in cases:
        manifest = pipeline.export(request(base, quantizer, more, out=tmp_path / name), quiet).manifest
        weights = max(manifest.weight_bytes, resident or 0)  # a tiny model's graph is larger than its numbers
        assert manifest.loaded_weight_bytes == resident and manifest.memory_of_weights == weights
        assert manifest.required_memory_bytes == weights + 256 * 192 * size
    assert (
        pipeline.export(request(base, QUANTIZERS["rtn"], out=tmp_path / "q4"), quiet).report["weight_bytes"] < numbers
    )


def test_a_tied_embedding_is_loaded_twice(tmp_path: Path) -> None:
    """Once in rows to be looked up, once in the order in which onnxruntime multiplies."""
    hub_models.write(tmp_path / "base", "qwen3")
    weights = checkpoint.open_folder(tmp_path / "base").weights
    given = request(tmp_path / "base", "use = 'none'", "[writer]\nuse = 'onnx'\n")
    loaded = pipeline.export(given, quiet).manifest.loaded_weight_bytes
    numbers = sum(weight.size for weight in weights.values())
    assert loaded == 4 * (numbers + weights["model.embed_tokens.weight"].size)


def test_the_report_says_on_what_it_rests(base: Path) -> None:
    exported = pipeline.export(request(base, QUANTIZERS["rtn"]), quiet)
    report = json.loads((base.parent / "out.report.json").read_text())
    assert report == exported.report
    text = pipeline.probe_text(request(base, QUANTIZERS["rtn"]))
    assert report["probe"] == {"text": text.name, "sha256": text.sha256, "windows": 2, "tokens": 48, "beginning": False}
    assert report["artifact_id"] == exported.artifact_id
    assert report["bits_per_weight"] == 8 * exported.manifest.weight_bytes / exported.manifest.parameters
    assert report["findings"]["engine_peak_memory_bytes"] > 1 << 20


def test_calibration_is_part_of_the_lineage_where_there_is_any(base: Path, tmp_path: Path) -> None:
    """A text that was edited gives another artifact, wherever it lies; and no path of this machine is in the manifest."""
    found = {}
    for name, content in (("one", "a"), ("two", "a"), ("three", "b")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "text.txt").write_text(
            "\n\n".join(f"Line {number} of {content} has {number} words." for number in range(300))
        )
        more = f"samples = 6\ntokens = 48\ndataset = '{folder / 'text.txt'}'\n[probe]\nwindows = 2\ntokens = 48\n"
        given = request(base, QUANTIZERS["gptq"], out=folder / "out")
        changed = recipe.parse(f"[quantizer]\n{QUANTIZERS['gptq']}\n[calibration]\n{more}")
        found[name] = pipeline.export(dataclasses.replace(given, recipe=changed), quiet)
    assert found["one"].artifact_id == found["two"].artifact_id != found["three"].artifact_id
    origin = found["one"].manifest.origin
    assert origin is not None
    assert [step.name for step in origin.steps] == ["checkpoint", "calibration text.txt"]
    assert str(tmp_path) not in (tmp_path / "one" / "out" / "manifest.json").read_text()
    plain = pipeline.export(request(base, QUANTIZERS["rtn"], out=tmp_path / "plain"), quiet).manifest.origin
    assert plain is not None
    assert [step.name for step in plain.steps] == ["checkpoint"]


def test_an_artifact_that_was_damaged_since_is_not_taken_for_whole(base: Path) -> None:
    exported = pipeline.export(request(base, QUANTIZERS["rtn"]), quiet)
    with (exported.folder / "model.gguf").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"x")
    with pytest.raises(DigestMismatch):
        pipeline.export(request(base, QUANTIZERS["rtn"]), quiet)


def test_the_same_inputs_give_the_same_id_and_others_another(base: Path, tmp_path: Path) -> None:
    ids = {}
    for number, out in enumerate(("one", "two")):
        ids[out] = pipeline.export(
            request(base, QUANTIZERS["gptq"], out=tmp_path / str(number) / "out"), quiet
        ).artifact_id
    assert ids["one"] == ids["two"]
    other = request(base, QUANTIZERS["gptq"] + "\ndamping = 0.02", out=tmp_path / "3" / "out")
    assert pipeline.export(other, quiet).artifact_id != ids["one"]


def test_another_artifact_is_never_overwritten(base: Path) -> None:
    first = pipeline.export(request(base, QUANTIZERS["none"]), quiet)
    with pytest.raises(Conflict, match="another artifact"):
        pipeline.export(request(base, QUANTIZERS["rtn"]), quiet)
    assert artifact.verify(first.folder) == first.manifest


def test_adapters_are_folded_and_in_the_lineage(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "adapter", "llama")
    exported = pipeline.export(request(base, QUANTIZERS["none"], adapters=((tmp_path / "adapter", 0.5),)), quiet)
    assert exported.manifest.origin is not None
    assert [step.name for step in exported.manifest.origin.steps] == ["checkpoint", "adapter adapter × 0.5"]
    assert exported.report["findings"]["divergence"] < 1e-4


# --- planted faults ---------------------------------------------------------------------------------------------------
def test_what_fails_a_limit_is_not_published(base: Path) -> None:
    for limit in ("divergence = 1e-6", "top1_agreement = 0.9999", "perplexity_increase = 0.5", "bits_per_weight = 3"):
        with pytest.raises(BadInput, match=limit.split(" ")[0]):
            pipeline.export(request(base, QUANTIZERS["rtn"], f"[limits]\n{limit}\n"), quiet)
        assert left_over(base) == []


def state(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    """Puts wrong values into the header."""
    own = llama.FAMILY.metadata
    monkeypatch.setattr(
        llama, "FAMILY", dataclasses.replace(llama.FAMILY, metadata=lambda config: {**own(config), **wrong})
    )


def plant(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]) -> None:
    original = writer.write

    def write(*arguments: Any) -> Any:
        written = original(*arguments)
        spoil(written.files[0])
        return written

    monkeypatch.setattr(writer, "write", write)


def test_flipped_bits_are_caught(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(-500, 2)
            byte = file.read(1)[0]
            file.seek(-500, 2)
            file.write(bytes([byte ^ 4]))

    plant(monkeypatch, flip)
    with pytest.raises(DigestMismatch, match="not what was written"):
        pipeline.export(request(base, QUANTIZERS["rtn"]), quiet)
    assert left_over(base) == []


def test_a_file_that_the_engine_refuses_is_not_published(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state(monkeypatch, {"attention.head_count": 3})
    with pytest.raises((EngineFailed, BadInput)):
        pipeline.export(request(base, QUANTIZERS["none"]), quiet)
    assert left_over(base) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope.freq_base": 1_000_000.0},
        {"attention.layer_norm_rms_epsilon": 0.5},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ],
)
@pytest.mark.parametrize("quantizer", ["none", "rtn"])
def test_silent_errors_of_the_header_are_caught(
    wrong: dict[str, Any], quantizer: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any limit in the recipe: the engine would load the file and compute nonsense."""
    state(monkeypatch, wrong)
    with pytest.raises(BadInput, match="something else from this file"):
        pipeline.export(request(base, QUANTIZERS[quantizer]), quiet)
    assert left_over(base) == []


def test_rows_in_the_wrong_order_are_caught(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from joulemark_exporter.families import _decoder

    monkeypatch.setattr(_decoder, "rotary_rows", lambda heads, rows: np.arange(rows))
    with pytest.raises(BadInput, match="something else from this file"):
        pipeline.export(request(base, QUANTIZERS["rtn"]), quiet)


def change_tokenizer(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[gguf_tokenizer.Vocabulary], gguf_tokenizer.Vocabulary]
) -> None:
    original = gguf_tokenizer.read
    monkeypatch.setattr(gguf_tokenizer, "read", lambda *arguments: change(original(*arguments)))


def test_a_wrong_tokenizer_is_caught(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(found: gguf_tokenizer.Vocabulary) -> gguf_tokenizer.Vocabulary:
        tokens = list(found.tokens)
        one, other = tokens.index("e"), tokens.index("o")
        tokens[one], tokens[other] = tokens[other], tokens[one]
        return dataclasses.replace(found, tokens=tuple(tokens))

    change_tokenizer(monkeypatch, swap)
    with pytest.raises(BadInput, match=r"tokenizes .* otherwise"):
        pipeline.export(request(base, QUANTIZERS["none"]), quiet)


def test_the_wrong_rules_of_splitting_are_caught(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_models.write_tokenizer(base, hub_models.pre_tokenizers.ByteLevel(add_prefix_space=False))
    change_tokenizer(monkeypatch, lambda found: dataclasses.replace(found, pre="smollm"))
    with pytest.raises(BadInput, match=r"tokenizes .* otherwise"):
        pipeline.export(request(base, QUANTIZERS["none"]), quiet)


def test_a_missing_chat_template_is_caught(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(found: gguf_tokenizer.Vocabulary) -> gguf_tokenizer.Vocabulary:
        found.special.chat_template = None
        return found

    change_tokenizer(monkeypatch, drop)
    with pytest.raises(BadInput, match="chat template"):
        pipeline.export(request(base, QUANTIZERS["none"]), quiet)


# --- before hours are spent -------------------------------------------------------------------------------------------
def no_work(*_: Any) -> Any:
    raise AssertionError("this should have been said before")


def test_everything_wrong_is_said_before_the_quantizer_starts(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gptq", "lobi", "kquant", "rtn"):
        monkeypatch.setattr(f"joulemark_exporter.quantizers.{name}.quantize", no_work)
    cases = [
        ("use = 'lobi'\nbits_per_weight = 2.0", "below the smallest possible"),
        ("use = 'lobi'", "either budget_bytes or bits_per_weight"),
        ("use = 'kquant'\ntype = 'Q4_K_XL'", "no file type"),
        ("use = 'kquant'\ntensors = { '(' = 'Q8_0' }", "not a regular expression"),
        ("use = 'rtn'\ngroup_size = 7", "divide no row"),
        ("use = 'rtn'\nembedding = 'Q9_0'", "no tensor type"),
        ("use = 'gptq'\ngroup_size = 16", "groups have 16"),
        ("use = 'gptq'\nact_order = true", "not contiguous"),
        ("use = 'rtn'\nbits = 8\nsymmetric = false", "asymmetric 8-bit"),
    ]
    for quantizer, words in cases:
        with pytest.raises(BadInput, match=words):
            pipeline.export(request(base, quantizer), quiet)
    with pytest.raises(BadInput, match="probe text is the calibration text"):
        pipeline.export(request(base, QUANTIZERS["gptq"], 'text = "passages"\n'), quiet)
    path = base / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(BadInput, match="Whitespace"):
        pipeline.export(request(base, QUANTIZERS["gptq"]), quiet)


def test_damaged_weights_are_named_before_the_quantizer_starts(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 5] = torch.inf
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(gptq, "quantize", no_work)
    with pytest.raises(BadInput, match=r"layers\.2\.self_attn\.o_proj"):
        pipeline.export(request(base, QUANTIZERS["gptq"]), quiet)


def test_a_full_disk_is_noticed_first(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(NoSpace, match="the artifact needs"):
        pipeline.export(request(base, QUANTIZERS["rtn"]), quiet)
    assert left_over(base) == []


def test_a_probe_that_is_too_long_is_said_before_the_quantizer_starts(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "quantize", no_work)
    given = request(base, QUANTIZERS["gptq"])
    probe = given.recipe.probe.model_copy(update={"windows": 90_000, "tokens": 30_000})
    with pytest.raises(BadInput, match="90000 are asked for"):
        pipeline.export(dataclasses.replace(given, recipe=given.recipe.model_copy(update={"probe": probe})), quiet)


def test_a_disk_that_fills_up_while_it_writes_leaves_nothing_behind(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    plant(monkeypatch, full)
    with pytest.raises(OSError, match="No space"):
        pipeline.export(request(base, QUANTIZERS["gptq"]), quiet)
    assert left_over(base) == []
    work = base.parent / ".out.export"
    assert not (work / "written").exists(), "the large files are gone"
    assert len(list((work / "gptq").glob("layer-*.npz"))) == 3, "the layers are not"
    monkeypatch.undo()
    monkeypatch.setattr(gptq, "_layer", no_work)
    assert artifact.verify(pipeline.export(request(base, QUANTIZERS["gptq"]), quiet).folder)


# --- interruptions ----------------------------------------------------------------------------------------------------
def test_an_interrupted_export_goes_on_at_the_layer_it_had_reached(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.export(request(base, QUANTIZERS["gptq"], out=tmp_path / "whole" / "out"), quiet)
    original = gptq._matrix  # pyright: ignore[reportPrivateUsage]
    calls: list[int] = []

    def stop_in_the_third_layer(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(gptq, "_matrix", stop_in_the_third_layer)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(request(base, QUANTIZERS["gptq"]), quiet)
    assert left_over(base) == []
    calls.clear()
    calls.extend([1] * 100)
    resumed = pipeline.export(request(base, QUANTIZERS["gptq"]), quiet)
    assert len(calls) == 100 + 7, "only the third layer was still to do"
    assert resumed.artifact_id == whole.artifact_id


def test_what_another_recipe_left_is_not_taken_up(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gptq._matrix  # pyright: ignore[reportPrivateUsage]
    calls: list[int] = []

    def count(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(gptq, "_matrix", count)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(request(base, QUANTIZERS["gptq"]), quiet)
    calls.clear()
    calls.extend([1] * 100)
    pipeline.export(request(base, QUANTIZERS["gptq"] + "\nsymmetric = false"), quiet)
    assert len(calls) == 100 + 21


def test_two_exports_do_not_meet_in_one_folder(base: Path) -> None:
    import fcntl

    with (base.parent / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="another export"):
            pipeline.export(request(base, QUANTIZERS["rtn"]), quiet)
