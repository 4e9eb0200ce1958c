"""
How well the value head predicts V* of prompts that it never saw: R^2 against V* from the
reference's own responses.

    python train.py --keep_checkpoints=0 --max_steps=1
    python benchmarks/value_head.py --checkpoint=out/countdown/checkpoint_step_5000.pt

The checkpoint is the one that stage 1 leaves, after the last step of the warm-up: later the head
follows the policy. A model of a task in a file needs --task=FILE. V* from N responses is noisy
itself; the second figure is what a perfect head could reach, from two halves of them.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from apo import optimal_value
from model import token_logprobs
from sample import EVAL, held_out_problems, load, load_checkpoint, respond

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--checkpoint', required=True)
parser.add_argument('--task', default='')
parser.add_argument('--num_problems', type=int, default=300)
parser.add_argument('--num_samples', type=int, default=16)
args = parser.parse_args()

checkpoint = load_checkpoint(args.checkpoint)
settings = checkpoint['settings']
model, task, tokenizer = load(checkpoint, args.checkpoint, task_name=args.task)
problems = held_out_problems(task, args.num_problems)
batch = respond(model, task, tokenizer, problems, (settings['seed'], EVAL), args.num_samples,
                max_new_tokens=settings['max_new_tokens'], temperature=settings['temperature'])
rewards = batch.reward.view(len(problems), -1)
first = slice(None, None, args.num_samples)
_, predicted = token_logprobs(model, batch.tokens[first], batch.mask[first])


def r_squared(guess, truth):
    return 1 - ((guess - truth).square().mean() / truth.var(unbiased=False)).item()


truth = optimal_value(rewards, settings['beta1'])
one, other = (optimal_value(half, settings['beta1']) for half in rewards.chunk(2, dim=1))
noise = (one - other).square().mean() / 4 # variance of V* of all N, from the difference of its halves
print(f'{len(problems)} unseen prompts x {args.num_samples} responses: mean V* {truth.mean():.3f}, predicted '
      f'{predicted.mean():.3f}, R^2 {r_squared(predicted, truth):.2f}, at best '
      f'{1 - (noise / truth.var(unbiased=False)).item():.2f}')
