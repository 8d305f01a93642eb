#!/bin/bash
# Measures what only a GPU shows, in at most eight minutes. Needs no network. From the root of the repository:
#
#   benchmarks/gpu.sh                           all parts
#   PARTS="speed memory" benchmarks/gpu.sh      these
#   LIMIT_speed=300 benchmarks/gpu.sh           another time limit of a part, in seconds
#   OUT=folder                                  where results go (default: benchmarks/results/gpu)
#   PEERS=folder                                TRL, Liger and what they need beside .venv, from
#                                               pip install --no-deps --target folder trl==1.16.0 liger-kernel
#   REHEARSE=1 benchmarks/gpu.sh                tiny shapes on a CPU: shows that the script runs, measures nothing
#
# Each part writes PART.txt (raw output) and PART.jsonl (a line per measurement, written when it is made). A part that
# fails or runs out of time does not stop the others, and loses nothing that it had measured. results.json has it all.

cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-benchmarks/results/gpu}
PYTHON=${PYTHON:-.venv/bin/python}
# The most important first. Their limits add up to 480 s.
declare -A LIMITS=([machine]=28 [speed]=150 [memory]=100 [tests]=30 [variants]=65 [attention]=12 [inference]=20 [resume]=75)
PARTS=${PARTS:-machine speed memory tests variants attention inference resume}
export PYTHONPATH=.:tests:tests/support${PEERS:+:$PEERS} SFT_TEST_GPU=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_NVML_BASED_CUDA_CHECK=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
if [ -n "$REHEARSE" ]; then export SFT_TEST_GPU=rehearse CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1; fi

# Sets `command` to that of a part.
choose() {
	case $1 in
	tests) command=("$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py) ;;  # make test-gpu
	resume) command=("$PYTHON" -m sft verify-resume) ;;
	*) command=("$PYTHON" benchmarks/gpu.py "$1" --out "$OUT") ;;
	esac
}

mkdir -p "$OUT"
: > "$OUT/parts.txt"
for part in $PARTS; do
	if [ -z "${LIMITS[$part]}" ]; then echo "no part is called $part: ${!LIMITS[*]}" >&2; exit 2; fi
done
for part in $PARTS; do
	limit=LIMIT_$part
	limit=${!limit:-${LIMITS[$part]}}
	rm -f "$OUT/$part.jsonl" "$OUT/$part.txt"
	choose "$part"
	echo "== $part (at most $limit s): ${command[*]}"
	began=$SECONDS
	timeout --kill-after=5 "$limit" "${command[@]}" 2>&1 | tee "$OUT/$part.txt"
	code=${PIPESTATUS[0]}
	[ "$code" = 124 ] || [ "$code" = 137 ] && echo "== $part ran out of its $limit s; what it measured before is kept"
	echo "$part $code $((SECONDS - began))" >> "$OUT/parts.txt"
	$PYTHON benchmarks/gpu_summary.py "$OUT" > "$OUT/summary.txt" 2>&1
done
cat "$OUT/summary.txt"
