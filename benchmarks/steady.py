"""
Is A*PO steady? The default settings, without a word of tuning, from unlike bases.

    python benchmarks/steady.py                                 # an hour and a half on two cores
    python benchmarks/steady.py --pretrained=PATH               # and from pretrained weights

Four bounds: the held-out accuracy ends at or above the base's; no evaluation falls by more than 3
points below an earlier one (of 250 problems each, so 2 points of that are noise); the KL to the base
stays under 5 nats a response; the mean reward of ten steps never falls by more than 0.05 below its best
before. Runs are train.py's, in out/steady/, and are not taken again when they are there.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
from sample import read_log

BASES = {
    'countdown, the base in assets/': [f'--init_from={top}/assets/countdown_base.pt'],
    'multiplication, the base in assets/': [
        '--task=multiplication', f'--init_from={top}/assets/multiplication_base.pt'],
    'countdown after 2,000 steps of warm-up': ['--warmup_steps=2000'],
    'countdown with numbers to 99 after 4,000': ['--max_number=99', '--warmup_steps=4000'],
    'chain': ['--task=chain']}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pretrained', default='')
    parser.add_argument('--jobs', type=int, default=2, help='runs side by side, one thread each')
    args, extra = parser.parse_known_args() # what else is given goes to train.py
    bases = dict(BASES)
    if args.pretrained:
        bases['pretrained weights'] = [f'--init_from={args.pretrained}']
    print('| base | accuracy: base, end | worst fall between evaluations | greatest KL | worst fall of the reward '
          '| within all bounds |\n|---|---|---|---|---|---|', flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda name: measured(name, take(name, bases[name], extra)), bases):
            print(row, flush=True)


def take(name, settings, extra):
    """Train, unless that was done before. Returns the run's folder."""
    words = ''.join(c if c.isalnum() else '_' for c in ' '.join([name, *extra]))
    folder = os.path.join('out', 'steady', words)
    if os.path.exists(os.path.join(folder, 'results_summary.json')):
        return folder
    start = ['--init_from=resume', *[word for word in settings if '--init_from' not in word]]
    started = any(name.startswith('checkpoint_step') for name in os.listdir(folder)) if os.path.isdir(folder) else False
    command = [sys.executable, os.path.join(top, 'train.py'), f'--out_dir={folder}',
               *(start if started else settings), *extra]
    process = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL)
    if process.returncode:
        sys.exit(f"train.py stopped, see above: {' '.join(command)}")
    return folder


def measured(name, folder):
    """Return a row of the table."""
    with open(os.path.join(folder, 'results_summary.json')) as file:
        summary = json.load(file)
    rows = read_log(os.path.join(folder, 'metrics.jsonl'))
    steps = [row for row in rows if 'kl' in row]
    first = summary['settings']['warmup_steps']
    accuracy = [row['accuracy'] for row in rows if row['phase'] == 'evaluation' and row['step'] >= first]
    rewards = np.convolve([row['reward'] for row in steps], np.full(10, 0.1), 'valid')
    # Evaluations on the way are of the same eighth of the problems.
    fall, reward_fall = (max([0.0, *(before - after for i, after in enumerate(x) for before in x[:i])])
                         for x in (accuracy[1:-1], rewards))
    kl = max(row['base_kl'] for row in steps)
    steady = accuracy[-1] >= accuracy[0] and fall <= 0.03 and kl < 5 and reward_fall <= 0.05
    return (f"| {name} | {accuracy[0]:.1%}, {accuracy[-1]:.1%} | {100 * fall:.1f} points | {kl:.1f} "
            f"| {reward_fall:.3f} | {'yes' if steady else 'no'} |")


if __name__ == '__main__':
    main()
