"""R2 where a cache turns values behind it: learned for what the cache keeps, and for what o_proj reads."""

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard

from kurtail_pl.lit import KurTailModule
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.methods import CacheFormat, Int4PerTokenHead, PerTokenHead, Q4_0Cache
from kurtail_pl.methods.scheme import Scheme

SIZES = ModelSizes(layers=3, hidden_size=32, head_dim=64, kv_heads=2, rms_norm_eps=1e-6)
VLLM = 2 * torch.bernoulli(torch.full((64,), 0.5), generator=torch.Generator().manual_seed(0x9E3779B9)).numpy() - 1


def kurtosis(values: NDArray[np.float64]) -> float:
    return float(scipy.stats.kurtosis(values, axis=None, fisher=False, bias=True))


@pytest.mark.parametrize(
    ("cache", "turn"),
    [
        (Int4PerTokenHead(), np.diag(VLLM) @ hadamard(64) / 8),
        (Q4_0Cache(), hadamard(64) / 8),
        (PerTokenHead(), None),
        (None, None),
    ],
    ids=["vllm", "llama.cpp", "token-head", "float"],
)
@pytest.mark.parametrize("per_head", [False, True])
def test_both_bases_count_alike(cache: CacheFormat | None, turn: NDArray[np.float64] | None, per_head: bool) -> None:
    module = KurTailModule(SIZES, value_per_head=per_head, aim=Aim(Scheme(cache=cache)))
    generator = torch.Generator().manual_seed(1)
    batch = {
        "residual": torch.randn(6, 20, 32, generator=generator),
        "value": torch.randn(3, 20, 2, 64, generator=generator),
    }
    batch["value"] = batch["value"] ** 3
    r2, values = module.value.detach().double().numpy(), batch["value"].double().numpy()
    bases = [np.eye(64)] if turn is None else [np.eye(64), turn]
    expected: list[list[list[float]]] = []
    for basis in bases:
        layers = []
        for layer in range(3):
            heads = [values[layer, :, head] @ (r2[layer, head] if per_head else r2[layer]) @ basis for head in range(2)]
            layers.append([kurtosis(x) for x in heads] if per_head else [kurtosis(np.stack(heads))])
        expected.append(layers)
    _, _, found = module(batch)
    assert found.shape == ((len(bases), 3, 2) if per_head else (len(bases), 3))
    wanted = np.array(expected) if per_head else np.array(expected)[..., 0]
    np.testing.assert_allclose(found.detach(), wanted, rtol=1e-3)


def test_another_basis_is_another_training() -> None:
    """So that a run that was stopped is not gone on with for another runtime."""
    plain, turned = (KurTailModule(SIZES, aim=Aim(Scheme(cache=cache))) for cache in (PerTokenHead(), Q4_0Cache()))
    assert plain.settings()["cache"] is None
    assert turned.settings()["cache"] == {"kind": "Q4_0Cache", "settings": {"keys": True, "values": True}}
