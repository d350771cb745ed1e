#!/bin/sh
# The whole table of docs/results.md on the converted SmolLM2: build, calibrate in several ways, evaluate.
# Usage, from the repository's root: [LIMIT=400] [SHARED=../shared/data] sh examples/smollm2/table.sh
# Every step that is done already is kept; hours on two CPU cores.
set -eu
here=examples/smollm2
work=$here/work
python=${PYTHON:-.venv/bin/python}
cor="$python -m cor_vllm.cli"
model=$work/model
scores=$work/scores
mkdir -p "$scores"

test -e "$model/config.json" || $python $here/build.py --out "$model"
test -e $work/mirror/local || $python $here/mirror.py --out $work/mirror --shared "${SHARED:-../shared/data}"
test -e "$scores/ids.json" || $python $here/facts.py "$model" --out "$scores" --positions 500 --mirror $work/mirror

# The paper's setting; five times the text; answers in place of the highest losses; units moved by their gain.
named() { name=$1; shift; test -e "$scores/$name.safetensors" || $cor calibrate "$model" --output "$scores/$name.safetensors" "$@"; }
named main --num-tokens 1000
named more --num-tokens 5000
named facts --token-ids "$scores/ids.json" --positions "$scores/positions.json" --corpus default --intensity marginal
named shrunk --token-ids "$scores/ids.json" --positions "$scores/positions.json" --corpus default --shrink
named drop --num-tokens 1000 --ablation drop

$cor evaluate "$model" --backend transformers --cor-scores "$scores/main.safetensors" \
	--also more="$scores/more.safetensors" --also facts="$scores/facts.safetensors" \
	--also shrunk="$scores/shrunk.safetensors" --also drop="$scores/drop.safetensors" \
	--tasks "$here/tasks/trivia_choices.yaml,$here/tasks/trivia_statements.yaml,$here/tasks/sciq_choices.yaml,arc_easy" \
	--data $work/mirror --limit "${LIMIT:-400}" --conditions all --output $work/table
