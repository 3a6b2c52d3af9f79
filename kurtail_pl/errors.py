"""The errors a user can cause; each message names the value, what was expected and what to do next."""

from collections.abc import Sequence


class KurtailError(Exception):
    """Base of every error that the user can correct; the command line prints it without a traceback."""


class ConfigError(KurtailError, ValueError):
    """A setting is out of range or contradicts another one."""


class UnsupportedArchitecture(KurtailError):
    """The model's type has no record, or its modules do not match the record."""


class CheckpointError(KurtailError):
    """A model file is missing, damaged or of the wrong kind."""


class TextError(KurtailError):
    """A text source is unknown, unreadable or too short."""


class StoreMismatch(KurtailError):
    """An activation store was made from another model, tokenizer, text or seed than the one asked for."""


class ArtefactError(KurtailError):
    """An artefact folder is missing, incomplete, or would be overwritten."""


class ResumeMismatch(KurtailError):
    """Unfinished work stands where work with other settings is to be done."""


class NotWritable(KurtailError):
    """A file cannot be written: no permission, a read-only disk, too many open files. What was finished is kept."""


class DiskFull(NotWritable):
    """What is about to be written does not fit on the disk."""


class GateError(KurtailError):
    """A fold changed the model's output by more than its tolerance."""


class NotFinite(KurtailError):
    """A computation gave values that are not numbers, or too large for their type."""


class RuntimeUnusable(KurtailError):
    """ONNX Runtime is missing, installed twice, too old, or lacks the device that was asked for."""


class InputError(KurtailError, ValueError):
    """What was handed to a running model does not fit it: too long a text, or cache arrays of another shape or type."""


class CheckFailed(KurtailError):
    """An exported graph does not compute what the artefact does, or not in the way it should."""


class HarnessMissing(KurtailError):
    """Tasks were asked for and the lm-evaluation-harness is not installed."""


MAX_SEED = 2**32 - 1
"""NumPy takes no larger one."""


def require_seed(name: str, seed: int) -> None:
    """Raise ConfigError when a generator would not take a seed."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"{name} is {seed}; give a number from 0 to {MAX_SEED}")


REASON_LENGTH = 120
"""Characters of another library's message that an own message repeats."""
LIST_LENGTH = 160
"""Characters of a list of remarks in a message."""


def _visible(character: str) -> str:
    """A character, or its number where it has no form of its own: half of a pair, a control."""
    return character if character.isprintable() else f"\\u{ord(character):04x}"


def shortened(text: str, length: int) -> str:
    """A text on one line, or its beginning where it is longer."""
    text = "".join(map(_visible, " ".join(text.splitlines())))
    return text if len(text) <= length else f"{text[: length - 3]}..."


def first_of(names: Sequence[str], count: int = 1) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def listed(remarks: list[str]) -> str:
    """Several remarks for one message: as many as fit, and how many more there are."""
    shown = ""
    for number, remark in enumerate(remarks):
        more = f"; and {len(remarks) - number} more"
        longer = f"{shown}; {remark}" if shown else shortened(remark, LIST_LENGTH - len(more))
        if len(longer) > LIST_LENGTH - (len(more) if remark is not remarks[-1] else 0):
            return f"{shown}{more}"
        shown = longer
    return shown


def reason(error: BaseException) -> str:
    """What a foreign exception says, for one of our own messages: its first line, shortened."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return shortened(text, REASON_LENGTH)
