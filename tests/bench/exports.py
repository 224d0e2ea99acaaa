"""The exporter's figures of `make bench`: memory, time beside llama.cpp's converter, and what the methods gain on a real model.

Work runs in child processes, which say the peak of their resident memory. Needs 10 GB of disk for a while.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from joulemark import sources
from joulemark_exporter import pipeline, recipe
from tests.bench.pairs import Figure
from tests.fixtures import hub_models, llama_cpp_source
from tests.study.__main__ import EQUAL, FORMS, export_forms

SYNTHETIC = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
"""TinyLlama's shape: 1.1 billion parameters, 2.2 GB in bfloat16."""
RANK = 16

FOLD_AND_WRITE = """
import sys
from pathlib import Path
from joulemark_exporter import families, lora, models
from joulemark_exporter.quantizers import Task, rtn
from joulemark_exporter.recipe import CalibrationSettings
from joulemark_exporter.writers import gguf
base, adapter, out = map(Path, sys.argv[1:4])
model = lora.fold(models.open_model(str(base), out), [(lora.read_adapter(adapter), 1.0)])
family = families.find(model.model_type)
task = Task("large", None, model, family, CalibrationSettings(), cache=out, threads=2, work=out, say=lambda *_: None)
gguf.write(task, rtn.quantize(task, rtn.Options()), out, gguf.Options(tokenizer_pre="gpt-2"))
"""
QUANTIZE_BY_LLAMA = """
import ctypes, sys
from llama_cpp import llama_cpp as llama
llama.llama_backend_init()
wanted = llama.llama_model_quantize_default_params()
wanted.ftype, wanted.nthread = llama.LLAMA_FTYPE_MOSTLY_Q4_0, 2
assert llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(wanted)) == 0
"""
GPTQ = """
import sys
from pathlib import Path
from joulemark.sources import default_cache
from joulemark_exporter import models
from joulemark_exporter.quantizers import gptq
from joulemark_exporter.recipe import CalibrationSettings
from tests.fixtures.exporting import task_of
import dataclasses
out = Path(sys.argv[2])
model = models.open_model(sys.argv[1], default_cache())
task = dataclasses.replace(
    task_of(model, out), cache=default_cache(), calibration=CalibrationSettings(samples=128, tokens=512)
)
gptq.quantize(task, gptq.Options())
"""


SAY_PEAK = """
from joulemark_exporter.peak_memory import peak_bytes
print(peak_bytes())
"""


@dataclass(frozen=True)
class Cost:
    """What a child took."""

    seconds: float
    peak_bytes: int


def cost(code: str, *words: str | Path) -> Cost:
    """Runs Python code in a child, which says its peak at its end. Raises CalledProcessError when it fails."""
    started = time.perf_counter()
    command = [sys.executable, "-c", code + SAY_PEAK, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command[:2], stderr=done.stderr[-2000:])
    return Cost(time.perf_counter() - started, int(done.stdout.split()[-1]))


# --- a large checkpoint -----------------------------------------------------------------------------------------------
def measure_large(say: Callable[[str], None]) -> Iterator[Figure]:
    """Fold, round and write 1.1 billion parameters; then the same without the fold by llama.cpp's own tools."""
    with tempfile.TemporaryDirectory(prefix="joulemark-bench-") as place:
        folder = Path(place)
        write_synthetic(folder / "base")
        write_adapter(folder / "adapter")
        (folder / "ours").mkdir()
        ours, theirs = list[Cost](), list[float]()
        for _ in range(2):  # the first time reads the checkpoint from the disk
            ours.append(cost(FOLD_AND_WRITE, folder / "base", folder / "adapter", folder / "ours"))
            started = time.perf_counter()
            llama_cpp_source.convert(folder / "base", folder / "float.gguf", "gpt-2", "bf16")
            cost(QUANTIZE_BY_LLAMA, folder / "float.gguf", folder / "theirs.gguf")
            theirs.append(time.perf_counter() - started)
        say(
            f"  ours {[round(item.seconds, 1) for item in ours]} s, llama.cpp's {[round(item, 1) for item in theirs]} s"
        )
        name = "fold + RTN + GGUF of 1.1 B parameters: peak resident memory"
        yield Figure(name, max(item.peak_bytes for item in ours) / 1e9, 1.5, "GB", at_least=False)
        name = "its time ÷ llama.cpp's converter and quantizer (which fold nothing)"
        yield Figure(name, min(item.seconds for item in ours) / min(theirs), 1, at_least=False)


def write_synthetic(folder: Path) -> None:
    """A checkpoint of random weights in shards, written tensor by tensor."""
    hub_models.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(SYNTHETIC))
    random = np.random.default_rng(0)
    width, inner, kv = 2048, 5632, 256
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }

    def matrix(shape: tuple[int, ...]) -> Any:
        return (random.standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)

    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, Any]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    ones = np.ones(width, ml_dtypes.bfloat16)
    save("ends.safetensors", {"model.embed_tokens.weight": matrix((32000, width)), "model.norm.weight": ones})
    save("head.safetensors", {"lm_head.weight": matrix((32000, width))})
    for number in range(22):
        tensors = {f"model.layers.{number}.{name}.weight": matrix(shape) for name, shape in layer.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"model.layers.{number}.{name}.weight": ones for name in norms}
        save(f"layer-{number}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_adapter(folder: Path) -> None:
    """A LoRA on queries and values of all layers."""
    folder.mkdir()
    random = np.random.default_rng(1)
    tensors: dict[str, Any] = {}
    for number in range(22):
        for name, rows in (("q_proj", 2048), ("v_proj", 256)):
            stem = f"base_model.model.model.layers.{number}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = random.standard_normal((RANK, 2048), np.float32) * np.float32(0.02)
            tensors[f"{stem}.lora_B.weight"] = random.standard_normal((rows, RANK), np.float32) * np.float32(0.02)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))


# --- a real model -----------------------------------------------------------------------------------------------------
def measure_gptq(say: Callable[[str], None]) -> Iterator[Figure]:
    """GPTQ of SmolLM2-135M on the default calibration."""
    base = sources.fetch("smollm2-135m-instruct-q4_1", sources.default_cache())
    with tempfile.TemporaryDirectory(prefix="joulemark-bench-") as place:
        took = cost(GPTQ, base, place)
    say(f"  GPTQ of SmolLM2-135M on 128 × 512 tokens took {took.seconds:.0f} s")
    yield Figure("GPTQ of SmolLM2-135M, 128 × 512: peak resident memory", took.peak_bytes / 1e9, 2.5, "GB", False)


def measure_methods(say: Callable[[str], None]) -> Iterator[Figure]:
    """What GPTQ gains over rounding to nearest on the same grid, and Lo-Bi over one type of equal bytes. Artifacts are kept and reused."""
    out = Path("bench-output").resolve()
    base = str(sources.fetch("smollm2-135m-instruct-q4_1", sources.default_cache()))
    for size in (32, 64, 128):
        found: dict[str, float] = {}
        for method in ("gptq", "rtn"):
            chosen = recipe.parse(
                f"[quantizer]\nuse = '{method}'\nbits = 4\ngroup_size = {size}\n"
                "[calibration]\nsamples = 32\ntokens = 256\n[probe]\nwindows = 8\ntokens = 256\n"
            )
            request = pipeline.Request(base, chosen, out / f"{method}-g{size}", sources.default_cache(), threads=2)
            request.out.parent.mkdir(exist_ok=True)
            found[method] = pipeline.export(request, lambda *_: None).report["findings"]["perplexity"]
        say(f"  g{size}: perplexity {found['gptq']:.2f} by GPTQ, {found['rtn']:.2f} by rounding to nearest")
        name = f"perplexity GPTQ − RTN, 4 bits symmetric g{size}"
        yield Figure(name, found["gptq"] - found["rtn"], 0, "", at_least=False, strict=True)
    forms = [form for form in FORMS if form.name in (EQUAL, "Lo-Bi")]
    exported = export_forms(forms, Path("study-output").resolve(), lambda *_: None)
    lost = {name: item.report["findings"]["divergence"] for name, item in exported.items()}
    say(f"  divergence {lost['Lo-Bi']:.4f} of Lo-Bi, {lost[EQUAL]:.4f} of one type, nats per token")
    yield Figure("KL(Lo-Bi) ÷ KL(one type of equal bytes)", lost["Lo-Bi"] / lost[EQUAL], 1, at_least=False, strict=True)
