"""The runner: sessions, cache, generation, perplexity, and what a user can do wrong with them."""

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import TEXTS, TOLERANCE
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.run import session as sessions
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.generate import Sampling, choose, generate
from kurtail_onnx.run.perplexity import perplexity
from kurtail_onnx.run.session import import_runtime, open_session

import kurtail_pl
from kurtail_pl.errors import ArtefactError, ConfigError, InputError, RuntimeUnusable
from kurtail_pl.stages.evaluation import perplexity as evaluate
from kurtail_pl.stages.export import export
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def opened(exported: Path) -> Export:
    return Export(exported)


@pytest.fixture(scope="module")
def session(opened: Export) -> Any:
    return open_session(opened.model, threads=1)


def test_greedy_tokens_are_transformers(opened: Export, session: Any, artefact: Path) -> None:
    """Behind one of several prompts: behind the others a value may lie on the border of two codes."""
    model = kurtail_pl.load(artefact)

    def equal(seed: int) -> bool:
        prompt = np.random.default_rng(seed).integers(2, 300, size=(1, 5))
        expected = model.generate(torch.from_numpy(prompt), max_new_tokens=20, do_sample=False)[0, 5:].tolist()
        return list(generate(Decoder(opened, session), prompt, Sampling(20))) == expected

    assert any(equal(seed) for seed in range(TEXTS))


def described(export: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of an export whose description has a change."""
    shutil.copytree(export, folder)
    file = folder / "kurtail_export.json"
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))
    return folder


def test_generation_ends_with_the_text(opened: Export, session: Any, tmp_path: Path) -> None:
    prompt = np.array([[5, 80, 7]])
    tokens = list(generate(Decoder(opened, session), prompt, Sampling(12)))
    stop = tokens[3]
    ending = Export(described(opened.folder, tmp_path / "ending", lambda d: d["model"].update(eos_token_ids=[stop])))
    ended = list(generate(Decoder(ending, session), prompt, Sampling(12)))
    assert ended == tokens[: tokens.index(stop) + 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=3), "kurtail_export.json has format 3, expected 2"),
        (lambda d: d.pop("sha256"), "sha256"),
        (lambda d: d["model"].update(positions="256"), r"model.positions is '256': Input should be a valid integer"),
        (lambda d: d["sha256"].update({"../outside": "0"}), r"names the file '../outside', which is not in its folder"),
        (lambda d: d["sha256"].update({"/etc/passwd": "0"}), "'/etc/passwd', which is not in its folder"),
        (lambda d: d["sha256"].update({"model.onnx": "0"}), "model.onnx is missing or damaged"),
        (lambda d: d["inputs"].__setitem__(0, 7), r"inputs.0 is 7"),
    ],
)
def test_descriptions_that_cannot_be_used(
    opened: Export, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ArtefactError, match=message) as error:
        Export(described(opened.folder, tmp_path / "other", change))
    assert len(str(error.value).splitlines()) == 1


def test_a_description_of_another_cache_is_refused(opened: Export, session: Any, tmp_path: Path) -> None:
    def widen(description: dict[str, Any]) -> None:
        next(i for i in description["inputs"] if i["name"].startswith("past_"))["shape"][3] = 10**12

    with pytest.raises(ArtefactError, match="another cache than the description"):
        Decoder(Export(described(opened.folder, tmp_path / "other", widen)), session)


def test_sampling_draws_from_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draw = np.random.default_rng(0)
    counts = np.bincount([choose(logits, Sampling(temperature=1.0), draw) for _ in range(4000)], minlength=4) / 4000
    # Four standard errors of a share: 4 sqrt(p (1 - p) / 4000) <= 0.032.
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.032)
    kept = {choose(logits, Sampling(temperature=1.0, top_p=0.6), draw) for _ in range(200)}
    assert kept == {0, 1}
    cold = {choose(logits, Sampling(temperature=0.01), draw) for _ in range(200)}
    assert cold == {choose(logits, Sampling(), draw)} == {0}


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str
)
def test_impossible_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling(**settings)


@pytest.mark.parametrize("length", [0, 250])
def test_prompts_that_do_not_fit_are_refused(opened: Export, session: Any, length: int) -> None:
    with pytest.raises(InputError, match="256 positions"):
        next(generate(Decoder(opened, session), np.ones((1, length), np.int64), Sampling(10)))


def test_texts_do_not_grow_over_the_positions(opened: Export, session: Any) -> None:
    decoder = Decoder(opened, session)
    decoder.forward(np.ones((1, 255), np.int64))
    with pytest.raises(InputError, match="257 tokens do not fit the model's 256 positions"):
        decoder.forward(np.ones((1, 2), np.int64))
    assert decoder.forward(np.ones((1, 1), np.int64)).shape == (1, 1, 300)


def test_padding_changes_nothing(opened: Export, session: Any) -> None:
    """In one of several batches: kernels of other sizes may put a value that lies on a border on its other side."""

    def equal(seed: int) -> bool:
        ids = np.random.default_rng(seed).integers(300, size=(2, 9))
        ids[1, :4] = 1
        mask = np.ones_like(ids)
        mask[1, :4] = 0
        both = Decoder(opened, session, batch=2).forward(ids, mask)
        alone = [Decoder(opened, session).forward(ids[n : n + 1, start:])[0] for n, start in ((0, 0), (1, 4))]
        errors = [np.abs(both[n, -len(logits) :] - logits).max() for n, logits in enumerate(alone)]
        return bool(max(errors) <= TOLERANCE * np.abs(both).max())

    assert any(equal(seed) for seed in range(TEXTS))


def test_a_cache_goes_on_in_another_decoder(opened: Export, session: Any) -> None:
    ids = np.random.default_rng(0).integers(300, size=(1, 12))
    whole = Decoder(opened, session)
    first = whole.forward(ids[:, :8])
    cache, rest = whole.cache(), whole.forward(ids[:, 8:])
    other = Decoder(opened, session)
    other.restore(cache, np.ones((1, 8), np.int64))
    np.testing.assert_array_equal(other.forward(ids[:, 8:]), rest)
    assert first.shape[1] == 8


@pytest.mark.parametrize("wrong", ["missing", "unknown", "dtype", "tokens", "heads"])
def test_wrong_cache_arrays_are_named(opened: Export, session: Any, wrong: str) -> None:
    decoder = Decoder(opened, session)
    decoder.forward(np.ones((1, 4), np.int64))
    cache, name = decoder.cache(), "past_key_values.1.key_value"
    if wrong == "missing":
        del cache[name]
    elif wrong == "unknown":
        name = "past_key_values.9.key_value"
        cache[name] = cache["past_key_values.1.key_value"]
    elif wrong == "dtype":
        cache[name] = cache[name].astype(np.int8)
    else:
        cache[name] = cache[name][:, :, 1:] if wrong == "tokens" else cache[name][:, 1:]
    with pytest.raises(InputError, match=name):
        Decoder(opened, session).restore(cache, np.ones((1, 4), np.int64))


def test_perplexity_is_the_stages(
    opened: Export, tiny: Path, make_artefact: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """Of weights alone: there is no border on the way of which a float rounding could decide the side."""
    artefact = make_artefact(tiny, activations=None, cache=None)
    exact = Export(export(artefact, tmp_path / "onnx", ONNX(), check=False))
    text = TextSpec(str(text_file), windows=3, seqlen=48)
    expected = evaluate.perplexity(Checkpoint(artefact), text)["perplexity"]
    assert perplexity(exact, text) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ConfigError, match="seqlen is 300 and the model has 256 positions"):
        perplexity(opened, TextSpec(str(text_file), windows=1, seqlen=300))


def test_cuda_that_is_not_there_is_an_error(opened: Export) -> None:
    if "CUDAExecutionProvider" in import_runtime().get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(RuntimeUnusable, match="CUDAExecutionProvider was asked for"):
        open_session(opened.model, device="cuda")


def test_a_missing_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnusable, match=r"kurtail-pl\[onnx\]"):
        import_runtime()


def test_both_builds_at_once_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.distribution
    monkeypatch.setattr(sessions.importlib.metadata, "distribution", lambda name: found("numpy") and name)
    with pytest.raises(RuntimeUnusable, match="onnxruntime and onnxruntime-gpu are both installed"):
        import_runtime()


def test_a_graph_that_cannot_be_loaded_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(RuntimeUnusable, match=r"cannot load .*model\.onnx"):
        open_session(tmp_path / "model.onnx")
