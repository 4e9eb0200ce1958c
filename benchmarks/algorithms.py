"""
A*PO against GRPO: from the same warmed-up base, with as many sampled responses, one line per algorithm over the seeds.

    python benchmarks/algorithms.py --task=countdown --seeds=3

Every run is one of train.py's, in out/algorithms/; one that is there already is not run again. GRPO has no stage 1:
what A*PO samples there it gets as further steps. Settings that only one of them has go into SETTINGS; GRPO's learning
rate is not tuned yet, and until it is, no line of this table speaks against it.
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
from sample import plot_runs

SETTINGS = {'apo': [], 'grpo': []} # beside the defaults

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--task', default='countdown')
parser.add_argument('--seeds', type=int, default=3)
parser.add_argument('--steps', type=int, default=0, help="of A*PO (default: train.py's)")
args, extra = parser.parse_known_args() # what else is given goes to train.py

auto = train.SETTINGS | train.AUTO['cpu'] | train.AUTO.get((args.task, 'cpu'), {}) | train.parse_arguments(extra)
steps = args.steps or auto['max_steps']
stage1 = auto['num_train_samples'] * auto['num_responses_per_prompt'] // auto['batch_size'] # in steps of A*PO
folders = {}
for seed in range(1, args.seeds + 1):
    for algorithm, settings in SETTINGS.items():
        folder = folders[algorithm, seed] = os.path.join('out', 'algorithms', f'{args.task}_{algorithm}_{seed}')
        if os.path.exists(os.path.join(folder, 'results_summary.json')):
            continue
        process = subprocess.Popen([
            sys.executable, os.path.join(top, 'train.py'), f'--task={args.task}', f'--algorithm={algorithm}',
            f'--init_from={top}/assets/{args.task}_base.pt', f'--out_dir={folder}', f'--seed={seed}',
            f'--max_steps={steps + stage1 * (algorithm == "grpo")}', *settings, *extra])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f'train.py stopped, see above: {folder}')
        with open(os.path.join(folder, 'peak_memory'), 'w') as file:
            file.write(str(usage.ru_maxrss / 2 ** 20)) # GiB

print('| algorithm | accuracy: mean (each seed) | minutes | KL to the base | response length | GiB at the most |\n'
      '|---|---|---|---|---|---|')
for algorithm in SETTINGS:
    runs = [folders[algorithm, seed] for seed in range(1, args.seeds + 1)]
    summaries = [json.load(open(os.path.join(run, 'results_summary.json'))) for run in runs]
    last = [[row for row in map(json.loads, open(os.path.join(run, 'metrics.jsonl'))) if 'kl' in row][-1]
            for run in runs]
    mean = lambda values: statistics.mean(list(values))
    print(f"| {algorithm} | {mean(s['accuracy'] for s in summaries):.1%} "
          f"({', '.join(format(s['accuracy'], '.1%') for s in summaries)}) "
          f"| {mean(s['seconds'] for s in summaries) / 60:.1f} | {mean(row['base_kl'] for row in last):.1f} "
          f"| {mean(s['length'] for s in summaries):.0f} "
          f"| {mean(float(open(os.path.join(run, 'peak_memory')).read()) for run in runs):.2f} |")
plot_runs([folders[algorithm, 1] for algorithm in SETTINGS], f'out/algorithms/{args.task}.png')
