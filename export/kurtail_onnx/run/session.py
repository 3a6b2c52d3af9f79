"""Sessions of ONNX Runtime, opened the way an export must be run."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from kurtail_onnx.profiles import PROFILES, Profile
from kurtail_pl.errors import RuntimeUnusable, reason

Device = Literal["cpu", "cuda"]
PROVIDERS: dict[Device, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    # TensorFloat-32 would round float32 products to 10 bits.
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}
BUILDS = ("onnxruntime", "onnxruntime-gpu")
OLDEST = "1.31"


def import_runtime() -> ModuleType:
    """The module `onnxruntime`.

    Raises:
        RuntimeUnusable: when it is missing, or both of its builds are installed: they overwrite each other's files.
    """
    installed = [name for name in BUILDS if _is_installed(name)]
    if len(installed) > 1:
        raise RuntimeUnusable(
            f"{' and '.join(installed)} are both installed and overwrite each other; uninstall both, then install one"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnusable(
            f"ONNX Runtime cannot be imported ({reason(error)}); run: pip install 'kurtail-pl[onnx]' "
            "(or [onnx-gpu] for CUDA)"
        ) from error
    runtime: ModuleType = onnxruntime
    return runtime


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def open_session(
    model: Path, profile: Profile = "exact", device: Device = "cpu", threads: int = 0, profiling: Path | None = None
) -> Any:
    """Open a graph.

    Args:
        model: its file.
        profile: exact or fast; see `profiles`.
        device: cpu or cuda.
        threads: of one operator on the CPU; 0 leaves the choice to ONNX Runtime.
        profiling: start of the name of a trace of all kernels, written when `end_profiling` is called.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        RuntimeUnusable: when ONNX Runtime is missing, cannot load the graph, or does not run it on the device.
    """
    runtime = import_runtime()
    _require_provider(device, runtime.get_available_providers())
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for key, value in PROFILES[profile].items():
        options.add_session_config_entry(key, value)
    if profiling is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profiling)
    if device == "cuda":
        runtime.preload_dlls()
    try:
        session = runtime.InferenceSession(str(model), options, providers=PROVIDERS[device])
    except Exception as error:  # its exceptions have no common base below Exception
        raise RuntimeUnusable(
            f"onnxruntime {runtime.__version__} cannot load {model}: {reason(error)}; {OLDEST} or newer is needed"
        ) from error
    # A build that knows CUDA but cannot start it falls back to the CPU without an error.
    _require_provider(device, session.get_providers())
    return session


def _require_provider(device: Device, available: Sequence[str]) -> None:
    wanted = PROVIDERS[device][0]
    name = wanted if isinstance(wanted, str) else wanted[0]
    if name not in available:
        raise RuntimeUnusable(
            f"{name} was asked for and ONNX Runtime has {', '.join(available)}; install onnxruntime-gpu with CUDA and "
            "cuDNN (pip install 'kurtail-pl[onnx-gpu]', without the plain onnxruntime), or use --device cpu"
        )
