"""
A*PO against GRPO and rejection sampling, and A*PO with one setting changed: from the same warmed-up base in assets/,
with as many sampled responses, over several seeds. Prints a table and draws accuracy against minutes and responses.

    python benchmarks/algorithms.py --seeds=3                      # the three algorithms
    python benchmarks/algorithms.py --table=rates --seeds=1        # the learning rate of each
    python benchmarks/algorithms.py --table=ablations --seeds=1    # A*PO, one setting away from the default

Every run is one of train.py's, in out/algorithms/; one that is there already is not run again. Only A*PO has a
stage 1: what it samples there the others get as further steps. Rejection sampling here is its on-policy form: every
step imitates the right ones among fresh responses, which is A*PO's loss replaced by one line.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

import torch

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
import train

GRPO, REJECTION = ['--algorithm=grpo'], ['--rejection']
TABLES = dict(
    algorithms={'A*PO': [], 'GRPO': GRPO, 'rejection sampling': REJECTION},
    rates={f'{name}, learning rate {rate}': [*settings, f'--learning_rate={rate}']
           for name, settings in [('A*PO', []), ('GRPO', GRPO), ('rejection sampling', REJECTION)]
           for rate in (1e-4, 2e-4, 4e-4, 8e-4)},
    ablations={' '.join(settings).replace('--', '') or 'default': settings for settings in (
        [], ['--num_responses_per_prompt=2'], ['--beta1=0.1'], ['--beta1=5'], ['--beta2=1e-4'], ['--beta2=1e-2'],
        ['--beta2=1e-1'], ['--ref_update_interval=20'], ['--fresh_prompts=False'],
        ['--fresh_prompts=False', '--filter_failed=True'], ['--partial_credit=0.5'])})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', default='countdown', choices=['countdown', 'multiplication'])
    parser.add_argument('--table', default='algorithms', choices=TABLES)
    parser.add_argument('--seeds', type=int, default=3)
    args, extra = parser.parse_known_args() # what else is given goes to train.py
    auto = train.SETTINGS | train.AUTO['cpu'] | train.AUTO.get((args.task, 'cpu'), {}) | train.parse_arguments(extra)
    results = {name: [run(args.task, seed, settings, auto, extra) for seed in range(1, args.seeds + 1)]
               for name, settings in TABLES[args.table].items()}
    print_table(results)
    plot(results, auto, f'out/algorithms/{args.task}_{args.table}.png')


def run(task, seed, settings, auto, extra):
    """Train, unless that was done before; returns the run's folder."""
    words = '_'.join([task, *(word.strip('-') for word in [*settings, *extra]), str(seed)])
    folder = os.path.join('out', 'algorithms', words)
    if os.path.exists(os.path.join(folder, 'peak_memory')):
        return folder
    more = 0 if settings[:1] not in (GRPO, REJECTION) else stage1_responses(auto) // auto['batch_size']
    process = subprocess.Popen([
        sys.executable, os.path.abspath(__file__) if '--rejection' in settings else os.path.join(top, 'train.py'),
        f'--task={task}', f'--init_from={top}/assets/{task}_base.pt', f'--out_dir={folder}', f'--seed={seed}',
        *settings, *extra, f'--max_steps={auto["max_steps"] + more}'])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f'train.py stopped, see above: {folder}')
    with open(os.path.join(folder, 'peak_memory'), 'w') as file:
        file.write(str(usage.ru_maxrss / 2 ** 20)) # GiB
    return folder


def stage1_responses(auto):
    return auto['num_train_samples'] * auto['num_responses_per_prompt']


def rows_of(folder):
    return [json.loads(line) for line in open(os.path.join(folder, 'metrics.jsonl'))]


def print_table(results):
    print('| what | accuracy: mean (each seed) | minutes | KL to the base | response length | GiB at the most |\n'
          '|---|---|---|---|---|---|')
    for name, folders in results.items():
        summaries = [json.load(open(os.path.join(folder, 'results_summary.json'))) for folder in folders]
        last = [[row for row in rows_of(folder) if 'kl' in row][-10:] for folder in folders] # ten steps, for the noise
        memory = [float(open(os.path.join(folder, 'peak_memory')).read()) for folder in folders]
        print(f"| {name} | {statistics.mean(s['accuracy'] for s in summaries):.1%} "
              f"({', '.join(format(s['accuracy'], '.1%') for s in summaries)}) "
              f"| {statistics.mean(s['seconds'] for s in summaries) / 60:.1f} "
              f"| {statistics.mean(row['base_kl'] for rows in last for row in rows):.1f} "
              f"| {statistics.mean(s['length'] for s in summaries):.0f} | {statistics.mean(memory):.2f} |")


def plot(results, auto, path):
    """Held-out accuracy, the mean over the seeds, against minutes and against sampled responses."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from sample import COLORS
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout='constrained', sharey=True)
    for (name, folders), color in zip(results.items(), COLORS * len(results)):
        runs = [[row for row in rows_of(folder) if row['phase'] == 'evaluation'] for folder in folders]
        first = 0 if 'grpo' in folders[0] or 'rejection' in folders[0] else stage1_responses(auto)
        steps = [rows[0] for rows in zip(*runs)]
        accuracy = [statistics.mean(row['accuracy'] for row in rows) for rows in zip(*runs)]
        minutes = [statistics.mean(row['seconds'] for row in rows) / 60 for rows in zip(*runs)]
        responses = [(row['step'] * auto['batch_size'] + first * (row['step'] > 0)) / 1000 for row in steps]
        for axis, x in zip(axes, (minutes, responses)):
            axis.plot(x, accuracy, 'o-', color=color, label=name)
    for axis, label in zip(axes, ('minutes', 'thousand responses, those of stage 1 included')):
        axis.set(xlabel=label, ylabel='held-out accuracy')
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def imitate_right_ones():
    """train.py with the loss of rejection sampling, which needs no V*."""
    sys.argv.remove('--rejection')
    train.apo_loss = lambda logprobs, ref_logprobs, rewards, values, beta2: -(rewards * logprobs).mean()
    train.estimate_values = lambda run: setattr(run, 'values', torch.zeros(1))
    train.main()


if __name__ == '__main__':
    imitate_right_ones() if '--rejection' in sys.argv else main()
