"""
Write held-out countdown puzzles in the form of TinyZero's data set, a JSON object with `nums` and `target` in each
line, so that other models can be graded on them; `sample.py --eval --problems=FILE` grades one of ours.

    python benchmarks/problems.py --max_number=99 --min_target=10 > benchmarks/countdown_99.jsonl

It takes the settings of the task. The puzzles are 1,000, the first that an evaluation with these settings takes.
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sample import held_out_problems, make_task

for numbers, target in held_out_problems(make_task('countdown', {}, sys.argv[1:]), 1000):
    print(json.dumps(dict(nums=numbers, target=target)))
