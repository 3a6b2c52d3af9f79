"""A GGUF file rounded by llama.cpp's own quantizer, with its defaults and no importance matrix.

Runs in an environment of its own, as two copies of llama.cpp do not share a process:

    python -m venv quantizer && quantizer/bin/pip install llama-cpp-py-sync
    quantizer/bin/python benchmarks/llama_quantize.py models/smollm2-jittered.gguf --types Q4_0 Q4_K_M

Each copy lies beside the file; embedding and head become what llama.cpp makes of them for the type.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import llama_cpp_py_sync
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib


def main() -> None:
    """Write the copies and print their names, with the version of llama.cpp."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q4_K_M"], help="as llama.cpp names them")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    ffi, llama = get_ffi(), get_lib()
    for name in given.types:
        parameters = ffi.new("llama_model_quantize_params *", llama.llama_model_quantize_default_params())
        parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}")
        parameters.nthread, parameters.allow_requantize = given.threads, True
        out = given.file.with_name(f"{given.file.stem}-{name}.gguf")
        if llama.llama_model_quantize(str(given.file).encode(), str(out).encode(), parameters):
            raise SystemExit(f"llama.cpp did not write {out}; its log is above")
        print(f"{out}, llama.cpp {llama_cpp_py_sync.__llama_cpp_tag__}", flush=True)


if __name__ == "__main__":
    main()
