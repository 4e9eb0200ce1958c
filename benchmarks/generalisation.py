"""
What training did beyond its own puzzles: pass@k before and after A*PO, on the held-out problems and
on problems of kinds that were never trained on (5 numbers, targets above 100, factors of three
digits).

    python benchmarks/generalisation.py --num_problems=200 --num_samples=16
"""
import argparse
import os
import sys

import numpy as np

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
from sample import EVAL, held_out_problems, load, load_checkpoint, pass_at_k, respond
from tasks import Countdown, Multiplication


def problems(task, count, wanted):
    """Return `count` problems that are `wanted`, the same in every run."""
    rng, found = np.random.default_rng(2025), []
    while len(found) < count:
        found += [p for p in [task.problem(rng)] if wanted(p)]
    return found


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--num_problems', type=int, default=200)
parser.add_argument('--num_samples', type=int, default=16)
args = parser.parse_args()
n = args.num_problems
SETS = dict(
    countdown={
        'held out': None,
        '5 numbers': problems(Countdown(min_numbers=5, max_numbers=5), n, lambda p: True),
        '4 numbers, target 101 to 150': problems(Countdown(min_numbers=4, max_target=150), n,
                                                 lambda p: p.target > 100)},
    multiplication={
        'held out': None,
        '3 x 1 digits': problems(Multiplication(999), n, lambda p: p.a > 99 and p.b < 10),
        '3 x 2 digits': problems(Multiplication(999), n, lambda p: p.a > 99 and 9 < p.b < 100)})

ks = [k for k in (1, 4, 16) if k <= args.num_samples]
print(f"| task | problems | model | {' | '.join(f'pass@{k}' for k in ks)} | truncated |\n|{'---|' * (4 + len(ks))}")
for name, sets in SETS.items():
    for which in ('base', 'trained'):
        path = f'{top}/assets/{name}_{which}.pt'
        checkpoint = load_checkpoint(path)
        models, settings = load(checkpoint, path), checkpoint['settings']
        for kind, chosen in sets.items():
            batch = respond(*models, chosen or held_out_problems(models[1], n), (settings['seed'], EVAL),
                            args.num_samples, max_new_tokens=settings['max_new_tokens'],
                            temperature=settings['eval_temperature'])
            solved = batch.correct.view(-1, args.num_samples).sum(1).int().tolist()
            print(f'| {name} | {kind} | {which} | '
                  + ' | '.join(f'{pass_at_k(solved, args.num_samples, k):.1%}' for k in ks)
                  + f" | {batch.truncated.mean():.1%} |", flush=True)
