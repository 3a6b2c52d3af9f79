"""The attention that tokens get, against loops over heads, queries and keys in double."""

import math

import pytest
import torch
from torch import Tensor

from kurtail_pl.maths import received
from kurtail_pl.maths.received import attention_received

KEYS, HEADS, KV_HEADS, WIDTH = 13, 6, 2, 8
SCALING = 0.3


def looped(query: Tensor, key: Tensor, sees: Tensor) -> list[float]:
    """`sees` ``[queries, keys]`` says which keys a query sees."""
    found = [0.0] * len(sees[0])
    for head in range(HEADS):
        keys = key[0, head * KV_HEADS // HEADS]
        for i, q in enumerate(query[0, head]):
            powers = [math.exp(SCALING * float(q @ k)) if sees[i, j] else 0.0 for j, k in enumerate(keys)]
            for j, power in enumerate(powers):
                found[j] += (power / sum(powers)) ** 2
    return found


@pytest.mark.parametrize("queries", [KEYS, 4])
@pytest.mark.parametrize("kind", ["causal", "window", "added"])
def test_sum_of_squared_attention(queries: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are those of the last keys; several blocks of them, the last one shorter."""
    monkeypatch.setattr(received, "QUERIES", 5)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, queries, WIDTH, generator=generator, dtype=torch.float64)
    key = torch.randn(1, KV_HEADS, KEYS, WIDTH, generator=generator, dtype=torch.float64)
    places = torch.arange(KEYS - queries, KEYS)[:, None]
    sees = torch.arange(KEYS) <= places
    if kind == "window":
        sees &= torch.arange(KEYS) > places - 3
    mask = {"causal": None, "window": sees, "added": torch.where(sees, 0.0, -torch.inf).double()}[kind]
    found = attention_received(query, key, None if mask is None else mask[None, None], SCALING)
    torch.testing.assert_close(found, torch.tensor(looped(query, key, sees), dtype=torch.float64))
