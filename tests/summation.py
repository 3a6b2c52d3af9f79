"""A plugin of pytest: matrix products add their terms in another order, as a processor of another kind would.

`SUMMATION=1 PYTHONPATH=tests pytest -p summation`: the number is the seed of the orders, one for each count of terms.
Programs that tests start add as this machine does.
"""

import functools
import os
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SEED = int(os.environ.get("SUMMATION", "0"))
FACTORS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}
"""Products, and which argument is their first factor."""


@functools.cache
def order_of(terms: int) -> Tensor:
    return torch.randperm(terms, generator=torch.Generator().manual_seed(SEED * 1_000_000 + terms))


class OtherOrder(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = FACTORS.get(func)
        if place is not None and args[place].is_floating_point() and args[place].device.type == "cpu":
            left, right = args[place], args[place + 1]
            order = order_of(left.shape[-1])
            factors = left.index_select(-1, order), right.index_select(-2, order)
            args = (*args[:place], *factors, *args[place + 2 :])
        return func(*args, **(kwargs or {}))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    with OtherOrder():
        return (yield)
