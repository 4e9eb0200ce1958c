"""
A*PO against GRPO, and A*PO with one setting changed: from the same warmed-up base in assets/, with
as many sampled responses, over several seeds. Prints a table and draws accuracy against minutes and
responses.

    python benchmarks/algorithms.py --seeds=3                      # the two algorithms
    python benchmarks/algorithms.py --table=rates --seeds=1        # the learning rate of each
    python benchmarks/algorithms.py --table=ablations --seeds=1    # A*PO, one setting away from the default

Every run is one of train.py's, in out/algorithms/; one that is there already is not run again. Only
A*PO has a stage 1: what it samples there GRPO gets as further steps.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
import train
from sample import COLORS
from tasks import TASKS

GRPO = ['--algorithm=grpo']
TABLES = dict(
    algorithms={'A*PO': [], 'GRPO': GRPO},
    rates={f'{name}, learning rate {rate}': [*settings, f'--learning_rate={rate}']
           for name, settings in [('A*PO', []), ('GRPO', GRPO)] for rate in (1e-4, 2e-4, 4e-4, 8e-4)},
    ablations={' '.join(settings).replace('--', '') or 'default': settings for settings in (
        [], ['--num_responses_per_prompt=2'], ['--beta1=0.1'], ['--beta1=5'], ['--beta2=1e-4'], ['--beta2=1e-2'],
        ['--beta2=1e-1'], ['--ref_update_interval=20'], ['--fresh_prompts=False'], ['--partial_credit=0.5'])})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', default='countdown', choices=['countdown', 'multiplication'])
    parser.add_argument('--table', default='algorithms', choices=TABLES)
    parser.add_argument('--seeds', type=int, default=3)
    args, extra = parser.parse_known_args() # what else is given goes to train.py
    kind = TASKS[args.task]
    common = train.SETTINGS | train.parameters(kind) | kind.defaults # what all runs have, but for the table's
    texts = train.read_arguments(extra)
    common |= {name: train.typed(name, text, common, args.task) for name, text in texts.items()}
    results = {name: [run(args.task, seed, settings, common, extra) for seed in range(1, args.seeds + 1)]
               for name, settings in TABLES[args.table].items()
               if train.read_arguments(settings).keys() <= common.keys()} # multiplication has no partial_credit
    print_table(results)
    plot(results, common, f'out/algorithms/{args.task}_{args.table}.png')


def run(task, seed, settings, common, extra):
    """Train, unless that was done before. Returns the run's folder."""
    words = '_'.join([task, *(word.strip('-') for word in [*settings, *extra]), str(seed)])
    folder = os.path.join('out', 'algorithms', words)
    if os.path.exists(os.path.join(folder, 'peak_memory')):
        return folder
    more = stage1_responses(common) // common['batch_size'] if settings[:1] == GRPO else 0
    process = subprocess.Popen([
        sys.executable, os.path.join(top, 'train.py'), f'--task={task}', f'--init_from={top}/assets/{task}_base.pt',
        f'--out_dir={folder}', f'--seed={seed}', *extra, *settings, f'--max_steps={common["max_steps"] + more}'])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f'train.py stopped, see above: {folder}')
    with open(os.path.join(folder, 'peak_memory'), 'w') as file:
        file.write(str(usage.ru_maxrss / 2 ** 20)) # GiB
    return folder


def stage1_responses(common):
    return common['num_train_samples'] * common['num_responses_per_prompt']


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


def plot(results, common, path):
    """Draw held-out accuracy, a mean over the seeds, against minutes and sampled responses."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout='constrained', sharey=True)
    for (name, folders), color in zip(results.items(), COLORS * len(results)):
        runs = [[row for row in rows_of(folder) if row['phase'] == 'evaluation'] for folder in folders]
        first = 0 if 'grpo' in folders[0] else stage1_responses(common)
        steps = [rows[0] for rows in zip(*runs)]
        accuracy = [statistics.mean(row['accuracy'] for row in rows) for rows in zip(*runs)]
        minutes = [statistics.mean(row['seconds'] for row in rows) / 60 for rows in zip(*runs)]
        responses = [(row['step'] * common['batch_size'] + first * (row['step'] > 0)) / 1000 for row in steps]
        for axis, x in zip(axes, (minutes, responses)):
            axis.plot(x, accuracy, 'o-', color=color, label=name)
    for axis, label in zip(axes, ('minutes', 'thousand responses, those of stage 1 included')):
        axis.set(xlabel=label, ylabel='held-out accuracy')
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    main()
