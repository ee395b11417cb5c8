#!/usr/bin/env bash
# Measures every row on a GPU machine and appends them to benchmarks/results, the most wanted parts first.
#
#     benchmarks/all_rows.sh [PART ...]      parts: bf16 int4 fp8 7b kernels online int8 head server compare
#
# PYTHON, REPEATS, TRACE (Azure's conversation trace) and OUT_DIR may be set. A row is stored when it is
# measured, so a run that is cut short keeps what it has.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
repeats=${REPEATS:-3}
out=${OUT_DIR:-benchmarks/results}
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(bf16 int4 fp8 7b kernels online int8 head server compare)

bench() { "$python" -m sailfish.cli.main bench "$@" --repeats "$repeats"; }
engine() { bench engine --shape "$@" --out "$out/engine.jsonl"; }
rows="decode,ttft 2048,prefill 64,tput,resident weights,start"

for part in "${parts[@]}"; do
    echo "== $part, after $SECONDS s"
    case $part in
        bf16) engine llama-3.1-8b --only "$rows" ;;
        int4) engine llama-3.1-8b --weights int4 --only "$rows" ;;
        fp8) engine llama-3.1-8b --weights fp8 --only "$rows" ;;
        int8) engine llama-3.1-8b --weights int8 --only "decode,ttft 2048" ;;
        7b) engine llama-2-7b --weights int4 --only "decode,resident weights" ;;
        head)
            engine llama-3.1-8b --weights int4 --head int4 --only "decode B=1"
            engine llama-2-7b --weights int4 --head int8 --embedding int8 --only "resident weights"
            ;;
        kernels) bench kernels --out "$out/kernels.jsonl" ;;
        online) engine llama-3.1-8b --only "prefix,replay" ${TRACE:+--trace "$TRACE"} ;;
        server)
            for processes in 1 8; do
                bench server --step-ms 15 --api-processes $processes --out "$out/server.jsonl"
            done
            ;;
        compare) "$python" benchmarks/compare_torch.py --out "$out/compare.jsonl" ;;
        *) echo "no part is called $part" >&2 && exit 2 ;;
    esac
done
