#!/bin/sh
# All that docs/results/evaluation.md shows: three to four hours on two cores.
#
#     sh benchmarks/evaluation.sh data/qa data/text MINILM [runs]
#
# MINILM is the folder of all-MiniLM-L6-v2. Answers and banks (about 3 GB) are kept in runs; the same
# command goes on where it was stopped. Ends with the report in docs/results.
set -eu
if [ $# -lt 3 ]; then
    echo "usage: sh benchmarks/evaluation.sh SETS TEXTS MINILM [RUNS]" >&2
    exit 2
fi
sets=$1 texts=$2 minilm=$3 runs=${4:-runs}

run() {
    msa eval run "$@" --data "$sets" --texts "$texts" --minilm "$minilm" --bank "$runs/banks" \
        --output "$runs/evaluation"
}

run qa/squad --systems msa gold bm25-1 minilm-1 --count 100
run qa/squad --systems msa:evidence_weight=0 msa:lexical_weight=0 msa:refusal_threshold=0.756 \
    msa:max_documents_per_round=1,max_rounds=1 msa:max_documents_per_round=2 \
    msa:answer_beginnings=1 closed closed+memory --count 100
run qa/nq_litm qa/policyqa --systems msa msa:lexical_weight=0 gold bm25-1 minilm-1 --count 60
run qa/covidqa --systems msa msa:lexical_weight=0 gold bm25-1 minilm-1 --count 40
run qa/hotpotqa qa/2wikimultihopqa --systems msa msa:max_rounds=1 msa:lexical_weight=0 gold bm25-4 \
    minilm-4 --count 60
run 'ruler/niah_*' --sizes 32K --systems msa bm25-5 --count 20
run changing --sizes 16K --systems msa --count 16
run 'ruler/niah_*' --sizes 1M --systems msa --count 10
run curve/squad --sizes 16K --systems full --count 100
run curve/squad --sizes 16K,128K,1M,10M --systems msa bm25-1 --count 100
run curve/squad --sizes 16K,128K,1M --systems minilm-1 --count 100
run beyond --sizes 16K --systems msa bm25-5 gold --count 10
msa eval report "$runs/evaluation" --output docs/results/evaluation.html
python benchmarks/results_page.py
