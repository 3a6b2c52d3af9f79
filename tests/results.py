"""Results of a folder, as `evaluate_folder` writes them."""

from typing import Any

from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.storage.activations import block_sites


def results_of(method: str, **changes: Any) -> dict[str, Any]:
    """Made up."""
    cost = {"seconds": 10.4, "cpu_seconds": 12.0, "peak_bytes": 250_000_000, "device_peak_bytes": 0}
    making = {"fuse": cost, "quantize": {**cost, "peak_bytes": 350_000_000}}
    evaluation = {
        "perplexity": 12.3456, "source": "some/tales.txt", "windows": 6, "seqlen": 48, "tokens": 282,
        "text_sha256": "a" * 64,
    }  # fmt: skip
    evaluation |= changes.pop("evaluation", {})
    return {
        "method": method,
        "model": "tiny",
        "measured": {"model_sha256": "c" * 64},
        "scheme": (FLOAT if method == "float" else Scheme()).to_dict(),
        "evaluation": evaluation,
        "kurtosis": {"mean": 1.914, "max": 2.086, "rows": 20, "sites": dict.fromkeys(block_sites(4), 2.0)},
        "disk_bytes": 1000,
        "cost": {**({} if method == "float" else making), "evaluate": {**cost, "peak_bytes": 300_000_000}},
        **changes,
    }
