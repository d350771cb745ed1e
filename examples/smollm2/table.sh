#!/bin/sh
# The whole table of docs/results.md on the converted SmolLM2: build, calibrate in several ways, evaluate.
# Usage, from the repository's root: sh examples/smollm2/table.sh
# Variables: LIMIT (items a task, 300), CONDITIONS (all), CSV (a folder for mirror.py --csv, which is optional).
# Every step that is done already is kept. A condition takes 1 to 3 minutes for 300 items on a CPU core; there
# are some sixty, on four tasks.
set -eu
here=examples/smollm2
work=$here/work
python=${PYTHON:-.venv/bin/python}
cor="$python -m cor_vllm.cli"
model=$work/model
scores=$work/scores
mkdir -p "$scores"

test -e "$model/config.json" || $python $here/build.py --out "$model"
test -e $work/mirror/local || $python $here/mirror.py --out $work/mirror ${CSV:+--csv "$CSV"}
test -e $work/answers.jsonl || $python $here/facts.py --out $work/answers.jsonl --mirror $work/mirror

# The paper's setting; four times the text; answers in place of the highest losses, four draws of them.
named() { name=$1; shift; test -e "$scores/$name.safetensors" || $cor calibrate "$model" --output "$scores/$name.safetensors" "$@"; }
named main --num-tokens 1000 --seq-len 128
named more --num-tokens 4000 --seq-len 128
for draw in 0 1 2 3; do
	named answers$draw --answers $work/answers.jsonl --num-tokens 3700 --seed $draw --intensity marginal
done

tasks=$here/tasks/trivia_choices.yaml,$here/tasks/trivia_statements.yaml,$here/tasks/sciq_choices.yaml
$cor evaluate "$model" --backend transformers --cor-scores "$scores/main.safetensors" \
	--also more="$scores/more.safetensors" --also answers0="$scores/answers0.safetensors" \
	--also answers1="$scores/answers1.safetensors" --also answers2="$scores/answers2.safetensors" \
	--also answers3="$scores/answers3.safetensors" --tasks $tasks,arc_easy --data $work/mirror \
	--dtype bfloat16 --batch-size 64 --limit "${LIMIT:-300}" --conditions "${CONDITIONS:-all}" --output $work/table
