"""
Microseconds per grade: ordinary demonstrations, with the share of them that is right, and the worst
that 256 characters can do to the verifier.

    python benchmarks/grade_speed.py
"""
import argparse
import os
import sys
import timeit

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tasks import MAX_ANSWER, TASKS, CountdownProblem

WORST = {
    'deep parentheses': '(' * 127 + '1' + ')' * 127,
    'open parentheses': '(' * 256,
    'long sum': '1+' * 127 + '1',
    'tower of products': '*'.join(['99'] * 85),
    'continued fraction': '1/(' * 63 + '1' + ')' * 63,
    'one long number': '9' * 256,
    'white space': ' ' * 255 + '1',
}

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
rng = np.random.default_rng(0)
for name, kind in TASKS.items():
    task = kind()
    pairs = [(problem, task.demonstration(problem, rng)) for problem in (task.problem(rng) for _ in range(2000))]
    seconds = min(timeit.repeat(lambda: [task.grade(*pair) for pair in pairs], number=1, repeat=5)) / len(pairs)
    right = np.mean([task.grade(*pair).correct for pair in pairs])
    print(f'{name + " demonstrations":30}{seconds * 1e6:10.1f} us, {right:.0%} of {len(pairs)} right')
task = TASKS['countdown']()
for name, answer in WORST.items():
    assert len(answer) <= MAX_ANSWER, name
    response = f'</think><answer>{answer}</answer>'
    grade = lambda: task.grade(CountdownProblem((3, 5, 7), 22), response)
    seconds = min(timeit.repeat(grade, number=20, repeat=5)) / 20
    print(f'{name:30}{seconds * 1e6:10.1f} us')
