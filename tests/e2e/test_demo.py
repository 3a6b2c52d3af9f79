"""`kurtail demo`: what it prints first, Ctrl-C in its second part, and that it goes on from there."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kurtail_pl

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]
PROMPT = "The old king"
STEP = re.compile(r"step (\d+) of (\d+): (.*), (?:under 1|about \d+) min left$")
FIRST = ["float", "rtn", "kurtail (rtn)"]
SECOND = ["gptq", "quarot (gptq)", "kurtail (gptq)"]


def written(model: PreTrainedModel, tokenizer: Path) -> str:
    """What transformers' greedy generation adds, printed in one line."""
    reader = AutoTokenizer.from_pretrained(tokenizer)
    prompt = reader(PROMPT, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=1)
    text = reader.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return "".join(each for each in " ".join(text.split()) if each.isprintable()).replace("|", "\\|")


def lines_of(table: str) -> dict[str, list[str]]:
    """The cells of a table's lines, by their first one."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("| ")]
    return {first.strip(): [each.strip() for each in others] for first, *others in cells}


def artefacts(page: str) -> dict[str, Path]:
    return {name: Path(folder) for name, folder in re.findall(r"^- (\w+): (\S+)$", page, re.M)}


def stamps(folders: list[Path]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def interrupted_in_the_second_part(
    start: Callable[..., subprocess.Popen[str]], place: Path, command: list[object]
) -> tuple[list[str], str, str, int]:
    """Lines until the signal, what was printed, what was said afterwards, and the exit code."""
    process = start(place, *command)
    assert process.stderr is not None
    try:
        shown = []
        for line in process.stderr:
            shown.append(line)
            if ": gptq: " in line:
                break
        process.send_signal(signal.SIGINT)
        page, said = process.communicate(timeout=300)
    finally:
        process.kill()
    return shown, page, said, process.returncode


def test_ctrl_c_leaves_the_first_part_from_which_the_second_goes_on(
    start: Callable[..., subprocess.Popen[str]],
    kurtail: Callable[..., None],
    recipe: Path,
    tied: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, command = recipe.parent, ["demo", "--config", recipe, "--prompt", PROMPT]
    for _ in range(3):  # Now and then Python drops the signal, in code that cannot raise; the demo then ends as usual.
        shown, page, said, code = interrupted_in_the_second_part(start, place, command)
        if code != 0:
            break
        for folder in ("artifacts", "comparisons", "runs"):
            shutil.rmtree(place / folder)
    assert code == 130, said
    first = place / "comparisons" / "recipe" / "first.md"
    assert page == first.read_text() + "\n"
    *_, last = said.splitlines()
    assert last.startswith("kurtail demo: interrupted; the first part stands in comparisons/recipe/first.md")
    assert "Traceback" not in said

    # Three lines, each with what was measured and what the model writes.
    table, folders = lines_of(page), {name: place / folder for name, folder in artefacts(page).items()}
    assert list(table)[2:] == ["float", "rtn", "kurtail"]
    models = {"float": AutoModelForCausalLM.from_pretrained(tied)}
    models |= {name: kurtail_pl.load(folders[name]) for name in ("rtn", "kurtail")}
    for name, model in models.items():
        results = json.loads((folders[name] / "results.json").read_text())
        bits = "w16a16kv16" if name == "float" else "w4a4kv4"
        value = f"{results['evaluation']['perplexity']:.2f}"
        assert table[name] == [bits, value, written(model, tied)]
    assert "tales.txt: 2 windows of 128 tokens, 254 predicted. Computed in float32 on 1 thread." in page

    # One step after the other, the second part's after the first's.
    steps = [found.groups() for line in shown if (found := STEP.match(line))]
    assert [int(number) for number, *_ in steps] == list(range(1, len(steps) + 1))
    parts = list(dict.fromkeys(name.split(": ")[0] for *_, name in steps))
    assert parts == ["rtn", "float", "kurtail (rtn)", "sentences", "gptq"]

    # Again: nothing of the first part is made, and the second is.
    before = stamps(list(folders.values()))
    kurtail(place, *command)
    again = capsys.readouterr()
    assert again.out.startswith(page)
    assert stamps(list(folders.values())) == before
    assert "capture" not in again.err
    compared = lines_of(again.out.removeprefix(page))
    assert list(compared)[2:] == ["float", "rtn", "gptq", "quarot", "kurtail"]
    assert again.out.rstrip().endswith("Computed in float32 on 1 thread.")


def test_a_prompt_that_no_model_reads_is_refused_before_anything_is_made(
    kurtail: Callable[..., None], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        kurtail(recipe.parent, "demo", "--config", recipe, "--prompt", "")
    assert "the prompt is ''" in capsys.readouterr().err
    assert not (recipe.parent / "artifacts").exists()
