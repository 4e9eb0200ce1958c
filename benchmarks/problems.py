"""
Write held-out countdown puzzles in the form of TinyZero's data set, a JSON object with `nums` and `target` in each
line, so that other models can be graded on them; `sample.py --eval --problems=FILE` grades one of ours.

    python benchmarks/problems.py --max_number=99 --min_target=10 > benchmarks/countdown_99.jsonl

It takes the settings of the task. The puzzles are 1,000, the first that an evaluation with these settings takes.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sample import held_out_problems, make_task

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
settings = parser.parse_known_args()[1]
for numbers, target in held_out_problems(make_task('countdown', {}, settings), 1000):
    print(json.dumps(dict(nums=numbers, target=target)))
