"""`kurtail demo`: what 4 bits do to a model and what rotations do about it, in minutes; then the other baselines."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kurtail_pl.cli.arguments import prepared
from kurtail_pl.cli.cells import BASELINES, cells_of
from kurtail_pl.cli.failures import interrupted
from kurtail_pl.cli.making import Maker, Parsed, default_folder, recipe_of
from kurtail_pl.cli.recipes import recipe_file
from kurtail_pl.cli.refusals import planned
from kurtail_pl.cli.usage import OneLineParser
from kurtail_pl.lit.callbacks.lines import LEARN
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.progress import Step, Steps, shown, track
from kurtail_pl.stages.evaluation.continuation import continuation, prompted
from kurtail_pl.stages.evaluation.results import FLOAT_METHOD, read_results
from kurtail_pl.stages.planning.run import StagePlan
from kurtail_pl.stages.planning.speed import Speed
from kurtail_pl.stages.reporting.comparison import write_comparison
from kurtail_pl.stages.reporting.lines import Row
from kurtail_pl.stages.tables import markdown
from kurtail_pl.stages.text import said, title_of
from kurtail_pl.storage.card import is_ours
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import write_text
from kurtail_pl.storage.lock import alone_with

RECIPES = ("smollm2-135m", "demo")
PROMPT = "The sun rises in the"
TOKENS = 16
"""How many each model adds to the prompt."""
FIRST = "first.md"
"""Name of the first part's page, beside those of the comparison."""
SENTENCES, LET_WRITE = "sentences", 15.0
"""The step in which the models write, and the seconds that it is planned with."""
TYPICAL, BESIDE = Speed(flops=8e10, passes=2e9), 2.0
"""How fast two cores are, and the seconds of each step beside its computation; soon replaced by what steps took."""
STAGES = {
    "capture": ("capture activations", "capture layers"), "learn": ("learn rotations", LEARN),
    "fuse": ("fuse rotations", "fuse layers"), "quantize": ("round weights", "{} layers"),
    "evaluate": ("measure perplexity", "evaluate layers"),
}  # fmt: skip
"""What each planned stage does, and what its loop over layers is called, which for rounding begins with the rounder."""


def demo(arguments: list[str]) -> None:
    """Quantize SmolLM2-135M in minutes: float, RTN and KurTail with a sentence each, then the baselines by GPTQ."""
    options, overrides = _options(arguments)
    recipes = [argument for name in options.config for argument in ("--config", name)]
    with _quiet():
        # The line that shows the steps is the only one that is drawn again and again.
        recipe = recipe_of([*recipes, *overrides, "--trainer.enable_progress_bar", "false"], BASELINES)
        maker = Maker(options.out or default_folder(options.config), options.overwrite)
        unrotated, *_, rotated = cells_of([recipe], BASELINES[:1], None)
        first = [maker.parse(cell) for cell in (unrotated, rotated)]
        second = [maker.parse(cell) for cell in cells_of([recipe], None, None)]
        source = first[0].cli.datamodule.checkpoint
        prompted(source, options.prompt, TOKENS)  # Refused now, and not when the first models are made.
        steps = Steps(list(_plan(maker, first, second)))
        with shown(steps):
            rounded, reference = _made(maker, steps, first[0]), _measured(maker, steps, first[0])
            rows = [reference, rounded, _made(maker, steps, first[1])]
            page = _page(rows, source, options.prompt, steps)
        try:
            _tell(page, maker.folder)
            with shown(steps):
                rows = [reference, *(_made(maker, steps, parsed) for parsed in second)]
        except (KeyboardInterrupt, SystemExit) as error:
            if not interrupted(error):
                raise
            raise KeyboardInterrupt(
                f"interrupted; the first part stands in {maker.folder / FIRST}, and the same command makes the rest"
            ) from error
    with alone_with(maker.folder):
        print(write_comparison(rows, maker.folder), _computed(rows), sep="")


def _plan(maker: Maker, first: Sequence[Parsed], second: Sequence[Parsed]) -> Iterator[Step]:
    """What is left to do, in its order."""
    data = first[0].cli.datamodule
    done = {("capture", data.store_folder)} if data.store_folder.is_dir() else set()
    for parsed in (*first, *(parsed for parsed in second if parsed not in first)):
        steps = [] if maker.stands(parsed.artefact) else list(_steps(parsed, done))
        yield from steps
        if parsed is first[0] and not maker.stands(parsed.float_folder):
            *_, evaluate = planned(parsed.cli.trainer, data)
            yield Step(FLOAT_METHOD, *STAGES["evaluate"], _seconds(evaluate))
        if parsed is first[1]:
            yield Step(SENTENCES, "let each model write", SENTENCES, LET_WRITE)


def _steps(parsed: Parsed, done: set[tuple[str, Path]]) -> Iterator[Step]:
    """Those of one model; activations are captured once, and models of the same rotations learn and fuse once."""
    module, data, trainer = parsed.cli.model, parsed.cli.datamodule, parsed.cli.trainer
    root = Path(trainer.default_root_dir)
    places = {"capture": data.store_folder, "learn": root, "fuse": root}
    for stage in planned(trainer, data):
        key = stage.stage, places.get(stage.stage, parsed.artefact)
        if key in done or (stage.stage == "learn" and not module.learns):
            continue
        done.add(key)
        name, work = STAGES[stage.stage]
        work = work.format(parsed.quantization.spec.rounder.label)
        yield Step(parsed.title, name, work, _seconds(stage))


def _seconds(stage: StagePlan) -> float:
    return BESIDE + TYPICAL.seconds(stage.flops, stage.passes)


def _made(maker: Maker, steps: Steps, parsed: Parsed) -> Row:
    steps.begin(parsed.title)
    return maker.make(parsed)


def _measured(maker: Maker, steps: Steps, parsed: Parsed) -> Row:
    steps.begin(FLOAT_METHOD)
    return maker.measure_float(parsed)


def _page(rows: list[Row], source: Checkpoint, prompt: str, steps: Steps) -> str:
    """The first part's table: the perplexity of each model, and what it writes."""
    steps.begin(SENTENCES)
    lines = [_line(row, source, prompt) for row in track(rows, SENTENCES)]
    evaluation = read_results(rows[0].folder)["evaluation"]
    artefacts = "\n".join(f"- {read_results(row.folder)['method']}: {row.folder}" for row in rows)
    return (
        f"{markdown(('method', 'bits', 'perplexity', f'{prompt} ...'), lines)}\n\n"
        f"Perplexity on {title_of(evaluation['source'])}: {said(evaluation)}, "
        f"{evaluation['tokens']} predicted. {_computed(rows)} Each model writes {TOKENS} tokens, the most "
        f"likely one each time.\n\n{artefacts}\n"
    )


def _line(row: Row, source: Checkpoint, prompt: str) -> tuple[str, ...]:
    """A model's line of the table, with what it writes in one line of printable characters."""
    results = read_results(row.folder)
    bits, value = Scheme.from_dict(results["scheme"]).name, f"{results['evaluation']['perplexity']:.2f}"
    written = continuation(Checkpoint(row.folder) if is_ours(row.folder) else source, prompt, TOKENS)
    shown = "".join(each for each in " ".join(written.split()) if each.isprintable()).replace("|", "\\|")
    return results["method"], bits, value, shown


def _computed(rows: list[Row]) -> str:
    """How perplexities were computed: type and threads."""
    measured = [read_results(row.folder)["evaluation"] for row in rows]
    threads = sorted({str(evaluation.get("threads", "an unknown number of")) for evaluation in measured})
    return f"Computed in {measured[0]['dtype']} on {' or '.join(threads)} thread{'s' * (threads != ['1'])}."


def _tell(page: str, folder: Path) -> None:
    with alone_with(folder):
        write_text(folder / FIRST, page)
    print(page, flush=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the screen to the steps: of all logs only warnings, beside the lines that show where they stand."""
    levels = {"kurtail_pl": logging.WARNING, "kurtail_pl.progress": logging.INFO}
    levels |= dict.fromkeys(("lightning.pytorch", "lightning.fabric"), logging.WARNING)
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(
        "kurtail demo",
        description=demo.__doc__,
        epilog="Other options override settings of the recipes, as in fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", help=f"recipes, one over the other ({', '.join(RECIPES)})")
    parser.add_argument("--prompt", default=PROMPT, help=f"what each model goes on with ({PROMPT})")
    parser.add_argument("--out", type=Path, help="folder of the tables and recipes (comparisons/RECIPES)")
    parser.add_argument("--overwrite", choices=("true", "false"), default="false", help="make everything anew")
    options, others = parser.parse_known_args(prepared(arguments))
    options.overwrite = options.overwrite == "true"
    options.config = options.config or [str(recipe_file(name)) for name in RECIPES]
    return options, others
