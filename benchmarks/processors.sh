#!/usr/bin/env bash
# The tests as other processors would run them: other vector units and numbers of threads, other last bits.
#   benchmarks/processors.sh [arguments of pytest]
#   ATEN="default avx512" MKL=AVX2 THREADS=4 benchmarks/processors.sh tests/unit/maths
# Prints a line for each setting and one for each test that fails under it; ends with 1 when one did.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
status=0
for aten in ${ATEN:-default avx2 avx512}; do
  for mkl in ${MKL:-AVX2 AVX512}; do
    for threads in ${THREADS:-1 2 4}; do
      output=$(ATEN_CPU_CAPABILITY=$aten MKL_ENABLE_INSTRUCTIONS=$mkl OMP_NUM_THREADS=$threads \
        "$PYTHON" -m pytest -q -p no:cacheprovider "$@" 2>&1) || status=1
      echo "ATEN_CPU_CAPABILITY=$aten MKL_ENABLE_INSTRUCTIONS=$mkl threads=$threads: $(tail -n 1 <<<"$output")"
      grep -E "^(FAILED|ERROR)" <<<"$output"
    done
  done
done
exit $status
