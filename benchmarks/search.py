"""
What programs reach on the held-out countdown puzzles without learning, to read the accuracies by: random expressions,
right when one of them is; the demonstrations' search carried on without mistakes within a number of tokens; and the
four searches of examples/searches.py, each alone, one at random, and the best one for each puzzle.

    python benchmarks/search.py                                    # half a minute
    python benchmarks/search.py --min_numbers=5 --max_numbers=5    # the first two tables take the settings of the task
"""
import argparse
import os
import sys

import numpy as np

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
from examples.searches import ORDERS, Searches
from sample import held_out_problems, make_task
from tasks import ANSWER, END_ANSWER, END_THINK, EOS, Tokenizer, exact_value

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
task = make_task('countdown', {}, parser.parse_known_args()[1])
tokenizer, rng = Tokenizer(task.tokens), np.random.default_rng(0)


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
        if exact_value(random_expression(problem.numbers))[0] == problem.target:
            return count
    return most + 1


def tokens_until_right(search):
    """Count the tokens of the response that writes a search up to its solution and the answer; infinite if there is
    none."""
    tokens = 0
    for line, solution in search:
        if solution:
            rest = ':' + ' '.join(solution.steps) + END_THINK + ANSWER + solution.text[1:-1] + END_ANSWER + EOS
            return tokens + len(tokenizer.encode(line + rest))
        tokens += len(tokenizer.encode(line + '\n'))
    return np.inf


def print_table(problems, unit, limits, rows):
    """Print which shares of the problems need no more than each limit, by difficulty. The numbers of a row are
    (..., problems)."""
    kinds = [task.difficulty(problem) for problem in problems]
    print(f"\n| {unit} | {' | '.join(map(str, limits))} |\n" + '|---' * (1 + len(limits)) + '|')
    for name, needed in rows.items():
        for kind in sorted(set(kinds)):
            group = [other == kind for other in kinds]
            shares = [f'{np.mean(needed[..., group] <= limit):.1%}' for limit in limits]
            print(f"| {name}, {kind} | {' | '.join(shares)} |", flush=True)


problems = held_out_problems(task, 2000)
print_table(problems, 'tries', (1, 16, 64), {
    'random expressions': np.array([tries_until_right(problem, 64) for problem in problems])})
print_table(problems, 'tokens', (100, 200, 400, 800), {
    'the search': np.array([tokens_until_right(task.search(problem)) for problem in problems])})
task = Searches()
tokenizer = Tokenizer(task.tokens)
problems = held_out_problems(task, 2000)
# the first line names the search and is two tokens
needed = np.array([[2 + tokens_until_right(task.search(problem, order=order)) for problem in problems]
                   for order in ORDERS.values()])
# a response says '.' where the small results come first
names = ['small results first' if name == '.' else f'{name} first' for name in ORDERS]
print_table(problems, 'tokens', (100, 200, 400, 800), dict(zip(names, needed)) | {
    'one of the four at random': needed, 'the best of the four for each puzzle': needed.min(0)})
