#!/usr/bin/env bash
# The tests as other processors would run them: other vector units, numbers of threads and orders of sums.
#   benchmarks/processors.sh [arguments of pytest]
#   ATEN="default avx512" MKL=AVX2 THREADS=4 ORDERS= benchmarks/processors.sh tests/unit/maths
# Prints a line for each setting and one for each test that fails under it; ends with 1 when one did.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
# More threads than cores must not spin; `-p summation` is in tests/.
export OMP_WAIT_POLICY=PASSIVE PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}"
status=0

under() { # SETTING=VALUE... -- arguments of pytest
  local setting=()
  while [ "$1" != -- ]; do setting+=("$1"); shift; done
  shift
  output=$(env "${setting[@]}" "$python" -m pytest -q -p no:cacheprovider "$@" 2>&1) || status=1
  echo "${setting[*]}: $(tail -n 1 <<<"$output")"
  grep -E "^(FAILED|ERROR) " <<<"$output"
}

for aten in ${ATEN-default avx2 avx512}; do
  for mkl in ${MKL-AVX2 AVX512}; do
    for threads in ${THREADS-1 2 4}; do
      under ATEN_CPU_CAPABILITY="$aten" MKL_ENABLE_INSTRUCTIONS="$mkl" OMP_NUM_THREADS="$threads" -- "$@"
    done
  done
done
for order in ${ORDERS-1 2 3}; do
  under SUMMATION="$order" -- -p summation "$@"
done
exit $status
