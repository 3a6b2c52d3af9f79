"""What records allow, and where it is said."""

from pathlib import Path

from families import FAMILIES

from kurtail_pl.stages.tables import markdown
from kurtail_pl.surgery.allowances import allowance_table, allowances, sentence
from kurtail_pl.surgery.families import REGISTRY, architecture_of

ROOT = Path(__file__).parents[3]


def test_the_documentation_has_the_table_of_the_records() -> None:
    columns, *rows = allowance_table(REGISTRY.values())
    assert markdown(columns, rows) in (ROOT / "docs" / "families.md").read_text()


def test_what_is_not_as_usual_has_its_reason() -> None:
    for record in REGISTRY.values():
        unusual = [each for each in allowances(record) if each.how == "not allowed" or each[:2] == ("R1", "online")]
        assert all(each.reason for each in unusual)


def test_a_family_in_one_line() -> None:
    assert sentence(architecture_of(FAMILIES["llama3"]())) == "rotations of a llama: R1, R2 fused; R3, R4, R5 online"
    said = sentence(architecture_of(FAMILIES["gemma3"]()))
    assert said.startswith("rotations of a gemma3_text: R1 online (not fused: a norm multiplies the channels")
    assert said.endswith("; R2 fused; R3, R4, R5 online")
