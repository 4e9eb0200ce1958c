"""
What programs reach on the held-out countdown puzzles without learning, to read the accuracies by:
random expressions, right when one of them is, and the demonstrations' search carried on without
mistakes until a number of tokens.

    python benchmarks/search.py
"""
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sample import held_out_problems
from tasks import Countdown, Tokenizer, evaluate

task = Countdown()
tokenizer, rng = Tokenizer(task.tokens), np.random.default_rng(0)
problems = held_out_problems(task, 2000)


def random_expression(numbers):
    """Join two at random by a random operator, until one is left."""
    pool = [str(n) for n in numbers]
    while len(pool) > 1:
        x, y = (pool.pop(rng.integers(len(pool))) for _ in range(2))
        pool.append(f'({x}{"+-*/"[rng.integers(4)]}{y})')
    return pool[0]


def tries_until_right(problem, most):
    """Count the random expressions up to the first that is right, or most + 1."""
    for count in range(1, most + 1):
        if evaluate(random_expression(problem.numbers))[0] == problem.target:
            return count
    return most + 1


def tokens_until_right(problem):
    """Count the tokens of the search, its last line without the steps; infinite if it fails."""
    tokens = 0
    for line, solution in task.search(problem):
        tokens += len(tokenizer.encode(line + '\n'))
        if solution:
            return tokens
    return np.inf


def row(name, needed, limit):
    """Print the share of the problems that need no more than the limit."""
    shares = [np.mean([n <= limit for p, n in zip(problems, needed) if task.difficulty(p) == group])
              for group in ('3 numbers', '4 numbers')]
    print(f'| {name} | {np.mean(np.array(needed) <= limit):.1%} | ' + ' | '.join(f'{s:.1%}' for s in shares) + ' |')


print('| | all | 3 numbers | 4 numbers |\n|---|---|---|---|')
tries = [tries_until_right(p, 64) for p in problems]
for limit in (1, 16, 64):
    row(f'{limit} random expression{"s" * (limit > 1)}', tries, limit)
tokens = [tokens_until_right(p) for p in problems]
for limit in (100, 200, 400, 800):
    row(f'the search, {limit} tokens', tokens, limit)
