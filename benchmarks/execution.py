"""
How well a countdown model carries out a search that it does not give up: the log-probabilities of whole searches, as
the demonstrations write them, by kind of token and by length.

    python benchmarks/execution.py out/countdown assets/countdown_base.pt    # half a minute each

The model's choice to go on or to give up is left out. `P(whole search)` is the probability of every other token of a
search and its answer, so about the share of puzzles that a model solves which never gives up. It needs no sampling, so
it tells two warm-ups apart that an accuracy of 2,000 puzzles does not. The puzzles are of the development split.
"""
import argparse
import collections
import math
import os
import sys

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import sample
from model import token_logprobs
from tasks import ANSWER, END_ANSWER, END_THINK, EOS

KINDS = dict(wanted='what the target needs', made='what two numbers make', notice='seeing that they meet',
             joins='joining two of four', rest='copying what is left', solution='the solution', answer='the answer')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', help='checkpoints, or folders of runs')
    parser.add_argument('--task', default='', help="the file of the models' task, where it is one")
    parser.add_argument('--num_problems', type=int, default=300)
    parser.add_argument('--fold', type=int, default=1)
    args = parser.parse_args()
    print('| model | P(whole search) | up to 100 tokens | 250 | 400 | 800 |',
          *[f' {words} |' for words in KINDS.values()], sep='')
    print('|---' * (6 + len(KINDS)) + '|')
    for name in args.models:
        path = sample.find_checkpoint(name)
        model, task, tokenizer = sample.load(sample.load_checkpoint(path), path, 'cpu', args.task)
        if not hasattr(task, 'search'):
            sample.fail(f"{name} is a model of {type(task).__name__}, which has no search")
        task.fold = args.fold
        rng = np.random.default_rng(77)
        problems = [task.draw(rng, test=True) for _ in range(args.num_problems)]
        searches = [found for found in (search(task, tokenizer, problem) for problem in problems) if found]
        lengths, sums = measure(model, tokenizer, searches)
        whole = np.exp([-sum(by_kind.values()) for by_kind in sums])
        bounds = ((0, 100), (100, 250), (250, 400), (400, 800))
        groups = [whole[(lengths > low) & (lengths <= high)] for low, high in bounds]
        cells = [whole.mean()] + [group.mean() if len(group) else math.nan for group in groups]
        cells += [np.mean([by_kind[kind] for by_kind in sums]) for kind in KINDS]
        print(f'| {name} | ' + ' | '.join(f'{cell:.3f}' for cell in cells) + ' |', flush=True)


def search(task, tokenizer, problem):
    """Return the prompt of a problem and its whole search as (token, kind) pairs, None where it finds nothing within
    800 tokens. The kind of a choice to go on is ''."""
    pieces = []
    for line, solution in task.search(problem):
        pieces.append(('\n', ''))
        wanted, *found = line.split(':')
        if not found: # two of four numbers are joined, '6)12/4=3 9 8'
            join, *rest = wanted.split(' ')
            pieces += [(join, 'joins'), (' '.join(rest), 'rest')]
            continue
        z, *wanted = wanted.split(' ')
        x, y, *made = found[0].split(' ')
        pieces += [(z, 'rest'), (' '.join(wanted), 'wanted'), (':', 'wanted'), (f'{x} {y}', 'rest')]
        pieces += [(' '.join(made), 'made')]
        if solution:
            pieces += [(':', 'notice'), (' '.join(solution.steps), 'solution'), (END_THINK, '')]
            pieces += [(f'{ANSWER}{solution.text[1:-1]}{END_ANSWER}{EOS}', 'answer')]
            tokens = [(token, kind) for text, kind in pieces[1:] for token in tokenizer.encode(text)]
            return (tokenizer.encode(task.prompt(problem)), tokens) if len(tokens) <= 800 else None


def measure(model, tokenizer, searches):
    """Return the length of each search, and the negative log-probability of its tokens, in nats, by their kind."""
    lengths, sums = [], []
    searches = sorted(searches, key=lambda pair: len(pair[1])) # little padding in each piece
    for start in range(0, len(searches), 16):
        part = searches[start:start + 16]
        rows = [torch.tensor(prompt + [token for token, _ in tokens]) for prompt, tokens in part]
        masks = [torch.arange(len(row)) >= len(prompt) for row, (prompt, _) in zip(rows, part)]
        mask = pad_sequence(masks, batch_first=True)
        with torch.no_grad():
            logprobs, _ = token_logprobs(model, pad_sequence(rows, batch_first=True), mask)
        for row, marked, (_, tokens) in zip(logprobs, mask, part):
            by_kind = collections.Counter()
            for value, (_, kind) in zip(row[marked].tolist(), tokens):
                if kind:
                    by_kind[kind] -= value
            lengths.append(len(tokens))
            sums.append(by_kind)
    return np.array(lengths), sums


if __name__ == '__main__':
    main()
