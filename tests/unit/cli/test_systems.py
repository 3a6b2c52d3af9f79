"""The systems that recipes after `--config` make, and the order in which they are made."""

from pathlib import Path

import pytest

from kurtail_pl.cli.cells import Cell, order_of_making
from kurtail_pl.cli.failures import UsageError
from kurtail_pl.cli.making import default_folder
from kurtail_pl.cli.recipes import FOLDER
from kurtail_pl.cli.systems import groups_of, named_systems

METHODS = FOLDER / "methods"


def stems(names: list[list[str]]) -> dict[str, list[str]]:
    return {title: [Path(file).stem for file in files] for title, files in named_systems(groups_of(names)).items()}


def test_one_recipe_after_each_config_is_no_choice() -> None:
    assert named_systems(groups_of([["smollm2-135m"], ["kurtail-plus"]])) == {}


def test_several_are_as_many_systems_in_their_place() -> None:
    """Between what they go over and what goes over them; those with commas one over the other."""
    names = [["smollm2-135m"], ["quarot", "unrotated,gptq"], ["smoke"]]
    assert stems(names) == {
        "quarot": ["smollm2-135m", "quarot", "smoke"],
        "unrotated + gptq": ["smollm2-135m", "unrotated", "gptq", "smoke"],
    }


def test_two_choices_are_combined() -> None:
    found = stems([["quarot", "unrotated"], ["w4a16", "w4a8kv4"]])
    assert list(found) == ["quarot + w4a16", "quarot + w4a8kv4", "unrotated + w4a16", "unrotated + w4a8kv4"]
    assert found["unrotated + w4a16"] == ["unrotated", "w4a16"]


def test_a_pattern_names_what_the_shells_would() -> None:
    """Where recipes come in a package there is no folder for a shell to look into."""
    by_shell = [[str(path) for path in sorted(METHODS.glob("*.yaml"))]]
    assert stems([["methods/*"]]) == stems(by_shell)
    assert len(stems(by_shell)) > 20


def test_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rtn.yaml").write_text("seed_everything: 1\n")
    with pytest.raises(UsageError, match="two systems are called rtn"):
        named_systems(groups_of([["rtn", str(tmp_path / "rtn.yaml")]]))


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [\n")
    with pytest.raises(UsageError, match=r"broken\.yaml is not YAML"):
        groups_of([["rtn", str(broken)]])


def test_the_folder_of_many_has_a_short_name_of_its_own() -> None:
    many = [path.name for path in METHODS.glob("*.yaml")]
    assert default_folder(["a.yaml", "qwen2.5-1.5b.yaml"]) == Path("comparisons/a-qwen2.5-1.5b")
    folders = {default_folder(names) for names in (many, many[:-1], many[1:])}
    assert len(folders) == 3
    assert max(len(folder.name) for folder in folders) < 80


def test_cells_that_share_a_fused_model_are_made_together() -> None:
    """A run folder holds one; the rest of the order is that of the table."""

    def cell(seed: int, online: list[str], rounder: str) -> Cell:
        init = {"capture": {"model": "m", "text": {"source": "t"}}, "compute": {"dtype": "float32"}}
        return Cell(
            {
                "model": {"rotation_seed": seed}, "data": {"init_args": init}, "fusion": {"online": online},
                "quantization": {"rounder": rounder}, "seed_everything": 0,
            },
            seed,
        )  # fmt: skip

    cells = [cell(0, [], "a"), cell(0, ["R3"], "a"), cell(1, [], "a"), cell(0, [], "b"), cell(1, [], "b")]
    assert order_of_making(cells) == [0, 3, 1, 2, 4]
