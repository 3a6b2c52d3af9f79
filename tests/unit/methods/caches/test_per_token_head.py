"""What a cache of integers says and refuses; what attention reads of it is in `surgery/test_attention.py`."""

from collections.abc import Callable

import pytest
import torch

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import PerTokenHead, Sinks

TWO = Quantizer(2, symmetric=False)


@pytest.mark.parametrize(
    ("cache", "name", "sentence"),
    [
        (PerTokenHead(), "kv4", "keys and values in 4 bits, asymmetric, clip ratio 0.95"),
        (
            PerTokenHead(None, Quantizer(8, clip=Clip("quantile", 0.98), group_size=4), Sinks(2, 8)),
            "k16v8",
            "keys in float; values in 8 bits, symmetric, clip quantile 0.98, groups of 4; the first 2 tokens in 8 bits",
        ),
        (
            PerTokenHead(TWO, None, centre_keys=True),
            "k2v16",
            "keys in 2 bits, asymmetric, clip ratio 1; values in float; each channel's mean subtracted from keys",
        ),
    ],
)
def test_name_and_sentence(cache: PerTokenHead, name: str, sentence: str) -> None:
    assert cache.name == name
    assert cache.sentence() == sentence


def test_parts_of_it() -> None:
    cache = PerTokenHead(TWO, Quantizer(), Sinks(), centre_keys=True)
    assert cache.without("keys") == PerTokenHead(None, Quantizer(), Sinks())
    assert cache.without("values") == PerTokenHead(TWO, None, Sinks(), centre_keys=True)
    assert PerTokenHead(None).without("values") is PerTokenHead(TWO, None).without("keys") is None
    assert [cache.quantizer(part) for part in ("keys", "values", "queries")] == [TWO, Quantizer(), None]
    assert cache.with_quantizer("keys", Quantizer(8)) == PerTokenHead(Quantizer(8), Quantizer(), Sinks(), True)
    assert cache.with_quantizer("values", TWO) == PerTokenHead(TWO, TWO, Sinks(), True)


def test_a_part_without_quantizer_is_kept_as_it_is() -> None:
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    first = torch.arange(5).view(1, 1, 5, 1) < 1
    assert torch.equal(PerTokenHead(None, TWO, Sinks(1, 8)).kept_keys(x, first), x)
    assert torch.equal(PerTokenHead(TWO, None, Sinks(1, 8)).kept_values(x, first), x)
    assert not torch.equal(PerTokenHead(TWO, None).kept_keys(x, None), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerTokenHead(None, None), r"cache\.keys and cache\.values are null; write cache: null"),
        (lambda: PerTokenHead(None, TWO, centre_keys=True), "centre_keys is true and keys is null"),
        (lambda: PerTokenHead(4), "keys is 4: "),  # type: ignore[arg-type]
        (lambda: PerTokenHead(values=Quantizer(group_size=12)).require(16), "values.group_size is 12 .* has 16"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
