"""Foreign messages in ours: one short line."""

from kurtail_pl.errors import REASON_LENGTH, reason


def test_a_foreign_message_is_cut_to_one_short_line() -> None:
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(KeyError()) == "KeyError"
    cut = reason(OSError("x" * 1000))
    assert len(cut) == REASON_LENGTH
    assert cut.endswith("xxx...")
