"""
A demonstration with four numbers joins two and then searches among three. That may be a held-out puzzle of three
numbers. How many of these does the warm-up of the default run meet so, and does the model solve them more often?

    python benchmarks/overlap.py                                  # two minutes
"""
import argparse
import os
import re
import sys

import torch

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
from sample import EVAL, WARMUP, held_out_problems, load, load_checkpoint, respond
from tasks import Countdown, CountdownProblem

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--num_samples', type=int, default=4, help='responses to each puzzle')
num_samples = parser.parse_args().num_samples

path = f'{top}/assets/countdown_trained.pt'
checkpoint = load_checkpoint(path)
settings, task = checkpoint['settings'], Countdown()
held_out = [problem for problem in held_out_problems(task, settings['num_eval_samples']) if len(problem.numbers) == 3]
names = [task.canonical(problem) for problem in held_out]
met = set()
for step in range(settings['warmup_steps']):
    batch = task.training_problems((settings['seed'], WARMUP, step), range(settings['warmup_batch_size']))
    for problem, rng in batch:
        # A line such as `6)12/4=3 9 8` leaves the puzzle 3 9 8.
        for left in re.findall(r'\)\S+=(\d+ \d+ \d+)$', task.demonstration(problem, rng), re.M):
            met.add(task.canonical(CountdownProblem(tuple(map(int, left.split())), problem.target)))

responses = respond(*load(checkpoint, path), held_out, (settings['seed'], EVAL), num_samples,
                    max_new_tokens=settings['max_new_tokens'], temperature=1.0)
share = responses.correct.view(-1, num_samples).mean(1).cpu() # of each puzzle's responses that are right
inside = torch.tensor([name in met for name in names])
print('| held-out puzzles of three numbers | how many | right |\n|---|---|---|')
for which, chosen in (('met inside a demonstration', inside), ('not met', ~inside)):
    error = share[chosen].std() / len(share[chosen]) ** 0.5
    print(f'| {which} | {int(chosen.sum())} | {share[chosen].mean():.1%} ± {1.96 * error:.1%} |')
