#!/bin/sh
# A group of lm-evaluation-harness that another group names, with a field changed, shrinks to one of its tasks.
#
# Versions:    lm_eval 0.4.13, datasets 5.2.0, Python 3.11, Linux. It needs some 800 MB of disk and no torch.
# Input:       three tasks of four questions each; a group `inner` of the three; a group `outer` whose only
#              entry is `task: inner` with `num_fewshot: 0`. The harness's documentation of groups has this form
#              for MMLU, and its own benchmark `openllm` uses it.
# Expectation: `outer` has the same three tasks as `inner`, with the field changed in each: the documentation
#              says that the change reaches all children of a group.
# Behaviour:   TaskManager.load("outer") returns one task. It is called `inner` and holds the questions of the
#              last of the three. There is no error and no warning. A score of "mmlu" that is made in this way
#              is that of one subject out of 57. (The command line shows it: it ends in a RecursionError,
#              because the group then contains a task of its own name.)
# Cause:       the entry, its key `task` included, is merged into the configuration of every member, so all
#              members take the group's name, and a dictionary by name keeps the last one.
# Remedy:      name every single task of the group in the outer one.
# Output seen:
#     inner: part_a 4, part_b 4, part_c 4
#     outer: inner 4 (its first question: c0)
# Date:        27 November 2026
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lm_eval==0.4.13 datasets==5.2.0
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
cd "$folder"
mkdir tasks
for part in a b c; do
    for number in 0 1 2 3; do
        echo "{\"question\": \"$part$number\", \"answer\": 0}"
    done >"$part.jsonl"
    cat >"tasks/part_$part.yaml" <<END
task: part_$part
dataset_path: json
dataset_kwargs: {data_files: {test: $folder/$part.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
END
done
cat >tasks/inner.yaml <<END
group: inner
task: [part_a, part_b, part_c]
END
cat >tasks/outer.yaml <<END
group: outer
task: [{task: inner, num_fewshot: 0}]
END
cat >look.py <<END
import sys
from lm_eval.tasks import TaskManager

manager = TaskManager(include_path="tasks", include_defaults=False)
inner, outer = (manager.load([name])["tasks"] for name in ("inner", "outer"))
print("inner:", ", ".join(f"{name} {len(task.eval_docs)}" for name, task in sorted(inner.items())))
first = {name: task.eval_docs[0]["question"] for name, task in outer.items()}
print("outer:", ", ".join(f"{name} {len(task.eval_docs)} (its first question: {first[name]})"
                          for name, task in sorted(outer.items())))
sys.exit(not (sorted(inner) == ["part_a", "part_b", "part_c"] and first == {"inner": "c0"}))
END
"$folder/venv/bin/python" look.py 2>errors || { cat errors; echo "the behaviour has changed"; exit 1; }
