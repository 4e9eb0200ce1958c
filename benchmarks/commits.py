"""
How much faster is this working tree than an older commit? The same work by both, in turn: the median of the
older commit's seconds, of ours, and of the ratio of each pair, with its least and greatest.

    python benchmarks/commits.py e441012               # five pairs, some two minutes each
    python benchmarks/commits.py e441012 --pairs=1     # a first look
    python benchmarks/commits.py e441012 --pretrained=smollm2    # a step from pretrained weights instead

Decoding steps of random weights of the default size, 256 tokens for so many rows; the warm-up of the default run, of
which the first steps do not count; steps of A*PO from the older commit's assets/countdown_base.pt, of which the first
does not count, because until aad96c9 it took the responses of stage 1. A step from pretrained weights is one of GRPO,
without stage 1, because the prompts of e441012 earn nothing there; 32 responses, cut off at 20 tokens so that both
write about as many, and each commit asks in its own words.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROWS = (1, 32, 128)
DECODING = '''
import inspect, sys, time, torch
sys.path.insert(0, sys.argv[1])
from model import ModelConfig, Transformer, generate
config = ModelConfig(166, 900, 128, 4, 4, 2, 384, **({'qk_norm': True} if sys.argv[2] == 'ours' else {}))
never = {'ends': [-1]} if 'ends' in inspect.signature(generate).parameters else {'eos': -1}
model = Transformer(config).requires_grad_(False)
for rows in map(int, sys.argv[3:]):
    for _ in range(2): # the first one warms up
        started = time.perf_counter()
        generate(model, [[5, 6, 7, 8]] * rows, 256, **never)
    print((time.perf_counter() - started) / 256)
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('commit')
    parser.add_argument('--pairs', type=int, default=5)
    parser.add_argument('--pretrained', default='', help='a folder of weights, as examples/smollm2.py makes')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        older = os.path.join(folder, 'older')
        subprocess.run(['git', 'worktree', 'add', '--quiet', '--detach', older, args.commit], cwd=TOP, check=True)
        try:
            start = os.path.abspath(args.pretrained) if args.pretrained else f'{older}/assets/countdown_base.pt'
            measure = of_pretrained if args.pretrained else of_default
            pairs = []
            for i in range(args.pairs):
                pairs.append((measure(older, folder, start), measure(TOP, folder, start)))
                print(f'{i + 1} of {args.pairs} pairs', file=sys.stderr, flush=True)
        finally:
            subprocess.run(['git', 'worktree', 'remove', '--force', older], cwd=TOP, check=True)
    print(f'| what, on {os.cpu_count()} cores | {args.commit} | ours | ours / older |\n|---|---|---|---|')
    for name in pairs[0][0]:
        theirs, ours = ([pair[i][name] for pair in pairs] for i in range(2))
        ratios = sorted(b / a for a, b in zip(theirs, ours))
        print(f'| {name} | {statistics.median(theirs):.4g} | {statistics.median(ours):.4g} '
              f'| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |')


def of_default(tree, folder, base):
    """Return seconds by what was timed, with models of the default size."""
    code = [sys.executable, '-c', DECODING, tree, 'ours' if tree == TOP else 'older', *map(str, ROWS)]
    steps = subprocess.run(code, check=True, capture_output=True, text=True).stdout.split()
    result = {f'a decoding step, {rows} rows, ms': 1000 * float(step) for rows, step in zip(ROWS, steps)}
    rows = train(tree, folder, '--warmup_steps=100', '--max_steps=0')[20:]
    seconds, tokens = (sum(row[name] for row in rows) for name in ('seconds_update', 'tokens'))
    result['1,000 tokens of warm-up, ms'] = 1e6 * seconds / tokens
    rows = train(tree, folder, f'--init_from={base}', '--max_steps=7', '--num_train_samples=16',
                 '--learning_rate=1e-6')[1:] # the responses stay as long
    return result | seconds_of(rows, 'A*PO')


def of_pretrained(tree, folder, weights):
    """Return the seconds of a step from pretrained weights, and how many tokens it sampled."""
    rows = train(tree, folder, f'--init_from={weights}', '--task=multiplication', '--max_factor=40', '--batch_size=32',
                 '--algorithm=grpo', '--num_responses_per_prompt=4', '--max_new_tokens=20', '--max_steps=4')[1:]
    return seconds_of(rows, 'GRPO') | dict(tokens=statistics.mean(row['tokens'] for row in rows))


def seconds_of(rows, algorithm):
    """Return the mean seconds of a step's two parts."""
    rest = [row['seconds_reference'] + row['seconds_update'] for row in rows]
    return {f'sampling in a step of {algorithm}, s': statistics.mean(row['seconds_rollout'] for row in rows),
            f'reference and update in a step of {algorithm}, s': statistics.mean(rest)}


def train(tree, folder, *arguments):
    """Run the trainer of that tree. Returns what it logged of its steps."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, f'{tree}/train.py', *arguments, '--num_eval_samples=8', '--eval_interval=100',
                   f'--out_dir={out}/run']
        subprocess.run(command, cwd=out, check=True, capture_output=True)
        with open(f'{out}/run/metrics.jsonl') as file:
            rows = [json.loads(line) for line in file]
    return [row for row in rows if 'seconds_update' in row]


if __name__ == '__main__':
    main()
