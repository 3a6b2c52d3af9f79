"""Foreign messages in ours: one short line."""

from kurtail_pl.errors import LIST_LENGTH, REASON_LENGTH, listed, reason, shortened


def test_a_foreign_message_is_cut_to_one_short_line() -> None:
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(KeyError()) == "KeyError"
    cut = reason(OSError("x" * 1000))
    assert len(cut) == REASON_LENGTH
    assert cut.endswith("xxx...")


def test_a_name_with_line_breaks_stays_on_the_line() -> None:
    assert shortened("a\nb\r\nc\u2028d", 20) == "a b c d"
    assert shortened("a\nb" * 20, 10) == "a ba ba..."


def test_a_list_of_remarks_is_as_long_as_it_may_be_with_how_many_more() -> None:
    assert listed(["one", "two"]) == "one; two"
    for length in (1, 30, 60, 200):
        for count in (1, 2, 3, 50):
            remarks = [f"{number}".ljust(length, "x") for number in range(count)]
            text = listed(remarks)
            assert len(text) <= LIST_LENGTH
            shown = [part for part in text.split("; ") if not part.startswith("and ")]
            left = count - len(shown)
            assert text.endswith(f"; and {left} more") == (left > 0)
            assert all(
                remark.startswith(part.removesuffix("...")) for part, remark in zip(shown, remarks, strict=False)
            )
