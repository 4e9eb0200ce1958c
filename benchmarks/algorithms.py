"""
A*PO against the algorithms it is compared with, from the same warmed-up base and with as many sampled
responses.

    python benchmarks/algorithms.py                            # about eleven hours on two cores
    python benchmarks/algorithms.py --jobs=8                   # on a GPU, where a run takes about half a minute
    python benchmarks/algorithms.py --mine=benchmarks/my_loss.py '--only=mine;GRPO'     # a loss of one's own
    python benchmarks/algorithms.py --table=many_updates       # 1, 2 and 4 updates per batch
    python benchmarks/algorithms.py --table=ablations          # the default with one setting changed
    python benchmarks/algorithms.py --dry_run                  # what is still to do, and the tables so far

Each algorithm takes the best of three learning rates, chosen on another fold of the problems with two
seeds; a higher one has to be better by 0.1 points. Then fresh seeds at that rate are evaluated on the
held-out problems, which chose nothing. (The warm-up has demonstrated problems of the other fold, so
accuracies there are a little high.) The other two tables are of that fold alone, two seeds at the default's
rate (with AdamW's usual epsilon 4e-4, or what the row names), with half as many responses: 28 batches, about
the default's 32.

Every run is one of train.py's, in out/algorithms/. What it came to is kept in benchmarks/results/algorithms/, one
small file a run: a run that is there is not taken again, so the command can be stopped and repeated, and
prints what is committed. Records that name another base than assets/countdown_base.pt started from one that earlier
code had made by the same command, `python train.py --max_steps=0 --device=cpu`: delete them to compare from the present
one. Delete a row's records when its settings have changed.
"""
import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
from sample import COLORS, read_log

RESULTS = os.path.join(top, 'benchmarks', 'results', 'algorithms')
BASE = os.path.join(top, 'assets', 'countdown_base.pt')
RATES = ('2e-4', '4e-4', '8e-4') # of AdamW
LARGE_RATES = ('1e-2', '2e-2', '4e-2') # with a large epsilon
BATCH, BUDGET = 128, 7168 # responses of a step and of a run
TWICE_AS_MANY = ', 14,336 responses'
AS_ON_A_CPU = [f'--batch_size={BATCH}', '--warmup_batch_size=16', '--adam_eps=1e-2'] # on a GPU too
OURS = ['--num_train_samples=32'] # the default on a CPU, where a GPU's is 256
ADAMW = ['--adam_eps=1e-8'] # as everybody uses it
PLAIN = ['--max_step_kl=0', *ADAMW] # without our bound on a step, which the others do not have
AS_OURS = { # with our epsilon and our bound
    'A*PO': OURS,
    'GRPO, as A*PO': ['--algorithm=grpo'],
    'RLOO, as A*PO': ['--algorithm=rloo'],
    'REINFORCE, as A*PO': ['--algorithm=reinforce'],
    'rejection sampling, as A*PO': ['--algorithm=rejection']}
ALGORITHMS = AS_OURS | {
    'A*PO, plain AdamW': [*OURS, *ADAMW],
    'A*PO as published': [*PLAIN, '--centre=False', '--num_train_samples=256', '--fresh_prompts=False',
                          '--beta2=1e-3'],
    'GRPO': [*PLAIN, '--algorithm=grpo'],
    'RLOO': [*PLAIN, '--algorithm=rloo'],
    'REINFORCE': [*PLAIN, '--algorithm=reinforce'],
    'rejection sampling': [*PLAIN, '--algorithm=rejection'],
    'imitation goes on': ['--max_steps=0']}
# These are also given twice the responses.
TWICE = ('A*PO', 'GRPO, as A*PO', 'A*PO, plain AdamW', 'GRPO', 'rejection sampling')
MANY = { # several updates per batch: where the ratio is not 1
    'A*PO': OURS,
    'A*PO, 2 updates': [*OURS, '--updates_per_batch=2'],
    'A*PO, 4 updates': [*OURS, '--updates_per_batch=4'],
    'A*PO, 2 updates, beta2=0.05': [*OURS, '--updates_per_batch=2', '--beta2=0.05'],
    'GRPO, as A*PO': AS_OURS['GRPO, as A*PO'],
    'GRPO, as A*PO, 2 updates': ['--algorithm=grpo', '--updates_per_batch=2'],
    'GRPO': ALGORITHMS['GRPO']} | {
    f'{name}, {updates} updates': [*PLAIN, f'--algorithm={name.lower()}', f'--updates_per_batch={updates}']
    for updates in (2, 4) for name in ('GRPO', 'CISPO', 'GSPO')}
ABLATIONS = AS_OURS | {words.replace('--', ''): [*OURS, *words.split()] for words in ( # one setting changed
    '--max_step_kl=0', '--max_step_kl=0.02', '--adam_eps=1e-8 --learning_rate=8e-4',
    '--adam_eps=1e-8 --learning_rate=8e-4 --max_step_kl=0', '--centre=False',
    '--centre=False --value_learning_rate=1e-2', '--beta1=0.1', '--beta1=5', '--beta2=1e-3', '--beta2=1e-1',
    '--ref_update_interval=10')} | {
    'num_train_samples=256 fresh_prompts=False': ['--num_train_samples=256', '--fresh_prompts=False']}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--table', default='algorithms', choices=['algorithms', 'many_updates', 'ablations'])
    parser.add_argument('--seeds', type=int, default=8, help='fresh seeds of each algorithm')
    parser.add_argument('--only', default='', help='names of rows, with semicolons between them')
    parser.add_argument('--mine', default='', help='a file with a loss: see benchmarks/my_loss.py')
    parser.add_argument('--base', default=BASE, help='the checkpoint to start from')
    parser.add_argument('--jobs', type=int, default=2, help='runs side by side, one thread each')
    parser.add_argument('--dry_run', action='store_true')
    args = parser.parse_args()
    rows = dict(algorithms=ALGORITHMS, many_updates=MANY, ablations=ABLATIONS)[args.table]
    for path in filter(None, (args.mine, args.base)):
        if not os.path.isfile(path):
            parser.error(f'there is no file {path}')
    if args.base != BASE: # the last --init_from counts, and the record's name tells it
        rows = {name: [*settings, f'--init_from={args.base}'] for name, settings in rows.items()}
    if args.mine:
        rows = rows | {'mine': [*PLAIN, f'--algorithm={args.mine}']}
    if args.only:
        unknown = [name for name in args.only.split(';') if name not in rows]
        if unknown:
            parser.error(f"no row is called {unknown[0]!r}: there are {'; '.join(rows)}")
        rows = {name: rows[name] for name in args.only.split(';')}

    if args.table != 'algorithms':
        runs = at_one_rate(rows)
        take_all([one for plans in zip(*runs.values()) for one in plans], args) # seed by seed
        return print(table(runs, baseline='A*PO'))
    trials = trials_of(rows)
    take_all(sum(trials.values(), []), args)
    print(rates_table(trials, rows))
    runs = fresh_runs(rows, trials, args.seeds)
    take_all(sum(runs.values(), []), args)
    print(two_tables(runs))
    if not (args.dry_run or args.mine or args.only): # the page shows all rows
        plot(runs, os.path.join(top, 'benchmarks', 'results', 'algorithms.png'))


# --------------------------------------------------------------------------------------------------
# Runs

def rates_of(settings):
    """Return the three learning rates to choose from."""
    return RATES if {*ADAMW, '--max_steps=0'} & {*settings} else LARGE_RATES


def trials_of(rows):
    """Return the runs that choose a rate, {(name, rate): plans}, on another fold."""
    return {(name, rate): [plan(name, settings, seed, BUDGET, rate, fold=1) for seed in (1, 2)]
            for name, settings in rows.items() for rate in rates_of(settings)}


def at_one_rate(rows, seeds=(1, 2)):
    """Return the runs of each row at one rate, {name: plans}, on another fold."""
    runs = {}
    for name, settings in rows.items():
        own = [word.partition('=')[2] for word in settings if word.startswith('--learning_rate=')]
        rate = own[0] if own else '4e-2' if rates_of(settings) is LARGE_RATES else '4e-4'
        runs[name] = [plan(name, settings, seed, BUDGET // 2, rate, fold=1) for seed in seeds]
    return runs


def fresh_runs(rows, trials, seeds=8):
    """Return the runs at the best rate of each row, {name: plans}. A row without any trial has to wait."""
    runs = {}
    for name, settings in rows.items():
        accuracies = {rate: mean_accuracy(trials[name, rate]) for rate in rates_of(settings)}
        best = max(accuracies.values())
        if best:
            rate = next(rate for rate in accuracies if accuracies[rate] > best - 0.001) # no higher than it pays
            runs[name] = [plan(name, settings, seed, BUDGET, rate) for seed in range(11, 11 + seeds)]
            if name in TWICE:
                runs[name + TWICE_AS_MANY] = [
                    plan(name, settings, seed, 2 * BUDGET, rate) for seed in range(11, 11 + min(4, seeds))]
    return runs


def plan(name, settings, seed, budget, rate, fold=0):
    """Return (record, folder, command, budget) of one run: record is the file that it leaves."""
    words = [f'--seed={seed}', f'--fold={fold}', *settings]
    steps = budget // BATCH
    if '--max_steps=0' in settings: # imitation: as many demonstrations, 16 a step; rates of the warm-up
        scale = {'2e-4': 0.1, '4e-4': 0.3, '8e-4': 1.0}[rate]
        words += [f'--warmup_steps={budget // 16}', f'--warmup_learning_rate={3e-3 * scale}',
                  f'--warmup_muon_learning_rate={0.012 * scale}']
    else:
        prompts = [int(word.partition('=')[2]) for word in settings if word.startswith('--num_train_samples=')]
        steps -= 8 * sum(prompts) // BATCH # stage 1 answers each 8 times, which serves no step
        words += [f'--max_steps={steps}', '--eval_interval=8', f'--learning_rate={rate}']
    label = '_'.join([name, rate, str(budget), f'fold{fold}', f'seed{seed}'])
    label = label.replace(' ', '-').replace('*', '').replace(',', '')
    files = [word.partition('=')[2] for word in settings if word.endswith(('.py', '.pt'))] # a loss or base of one's own
    label += ''.join('_' + hashlib.blake2b(open(file, 'rb').read(), digest_size=3).hexdigest() for file in files)
    folder = os.path.join('out', 'algorithms', label)
    command = [sys.executable, os.path.join(top, 'train.py'), f'--out_dir={folder}', '--num_eval_samples=4000',
               f'--init_from={BASE}', *AS_ON_A_CPU, *words]
    return os.path.join(RESULTS, f'{label}.json'), folder, command, budget


def take_all(plans, args):
    """Take the runs that have no record yet, some side by side."""
    missing = [one for one in plans if not os.path.exists(one[0])]
    print(f'{len(missing)} of {len(plans)} runs to take', flush=True)
    if args.dry_run:
        return
    os.makedirs(RESULTS, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for i, record in enumerate(pool.map(lambda one: take(*one), missing), 1):
            print(f"{i}/{len(missing)} {os.path.basename(record['folder'])}: {record['accuracy']:.1%}", flush=True)


def remove_stopped(folder):
    """Remove the folder of a run that was stopped. One line and exit where it still writes there."""
    if not os.path.exists(folder):
        return
    with open(os.path.join(folder, '.lock'), 'a') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) # train.py holds it while it lives
        except BlockingIOError:
            sys.exit(f'error: another process is writing into {folder}')
    shutil.rmtree(folder)


def take(path, folder, command, budget):
    """Take one run, from its start, and write its record."""
    remove_stopped(folder)
    process = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL)
    if process.returncode:
        sys.exit(f"train.py stopped, see above: {' '.join(command)}")
    with open(os.path.join(folder, 'results_summary.json')) as file:
        summary = json.load(file)
    rows = read_log(os.path.join(folder, 'metrics.jsonl'))
    steps = [row for row in rows if 'kl' in row]
    record = dict(
        folder=folder, command=' '.join(command[1:]).replace(top + '/', ''), responses=budget,
        accuracy=summary['accuracy'], interval=summary['interval_95'], by_difficulty=summary['accuracy_by_difficulty'],
        minutes=summary['seconds'] / 60, git_commit=summary['git_commit'],
        kl=float(np.mean([row['base_kl'] for row in steps[-10:]])) if steps else None,
        greatest_kl=max([row['base_kl'] for row in steps], default=None),
        clipped=float(np.mean([row['grad_norm'] > summary['settings']['grad_clip'] for row in steps] or [0])),
        evaluations=evaluations_of(rows, steps, budget))
    with open(path + '.tmp', 'w') as file:
        json.dump(record, file, indent=1)
    os.replace(path + '.tmp', path)
    return record


def evaluations_of(rows, steps, budget):
    """Return [responses, minutes, accuracy, KL] of each evaluation. KL is that of the steps around, None
    where there are none."""
    found, last = [], rows[-1]['step']
    batch = BATCH if steps else budget // last # of imitation, demonstrations
    for row in rows:
        if row['phase'] == 'evaluation':
            near = [step['base_kl'] for step in steps if abs(step['step'] - row['step'] - 0.5) < 2]
            sampled = budget - batch * (last - row['step']) if row['step'] else 0
            found.append([sampled, round(row['seconds'] / 60, 2), row['accuracy'],
                          (round(float(np.mean(near)), 3) if near else None) if row['step'] else 0.0])
    return found


# --------------------------------------------------------------------------------------------------
# Tables and figure

def records(plans):
    return [json.load(open(path)) for path, *_ in plans if os.path.exists(path)]


def mean_accuracy(plans):
    return float(np.mean([record['accuracy'] for record in records(plans)] or [0]))


def interquartile_mean(values):
    """Return the mean of the middle half, over the last axis (rliable, arXiv 2108.13264)."""
    values = np.sort(values)
    cut, count = values.shape[-1] // 4, values.shape[-1]
    return values[..., cut:count - cut].mean(-1)


def bootstrap(values, draws=10000):
    """Return the 95% interval of the interquartile mean over seeds, which are drawn again with replacement."""
    drawn = np.random.default_rng(0).choice(values, (draws, len(values)))
    return np.quantile(interquartile_mean(drawn), [0.025, 0.975])


def reached(record, level, column):
    """Return what it took until an evaluation was at a level and stayed there on average with the next
    one, or None. column: 0 responses, 1 minutes."""
    found = record['evaluations']
    for now, after in zip(found, found[1:] + found[-1:]):
        if now[2] >= level and (now[2] + after[2]) / 2 >= level:
            return now[column]
    return None


def accuracy_at_kl(record, kl=1.0):
    """Interpolate between the evaluations; None for a run that never was as far."""
    points = sorted((x[3], x[2]) for x in record['evaluations'] if x[3] is not None)
    return float(np.interp(kl, *zip(*points))) if points and points[-1][0] >= kl else None


def median(values):
    """Return the median, where a run without a value counts as infinity; None for that."""
    middle = float(np.median([math.inf if value is None else value for value in values]))
    return middle if middle < math.inf else None


def at_kl(found):
    """Return the mean accuracy at KL 1, and of how many runs, as text."""
    values = [value for value in map(accuracy_at_kl, found) if value is not None]
    return f'{np.mean(values):.1%} ({len(values)})' if values else '–'


def worst_fall(record):
    """Return how far an evaluation on the way fell below an earlier one; all are of the same problems."""
    accuracy = [point[2] for point in record['evaluations'][1:-1]]
    return max([0.0, *(before - after for i, after in enumerate(accuracy) for before in accuracy[:i])])


def shown(value, form):
    return '–' if value is None else format(value, form)


def rates_table(trials, rows):
    lines = ['| accuracy on fold 1 at three rates | low | middle | high |', '|---|---|---|---|']
    for name, settings in rows.items():
        found = {rate: records(trials[name, rate]) for rate in rates_of(settings)}
        cells = [f'{rate}: ' + ', '.join(f"{record['accuracy']:.1%}" for record in found[rate]) for rate in found]
        if any(found.values()):
            lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def table(runs, baseline):
    lines = ['| | seeds | accuracy: interquartile mean | each seed | better than '
             f'{baseline} | KL at the end | greatest KL | at KL 1 | responses to 85% | to 90% | minutes to 85% '
             '| to 90% | minutes | fell by 3 points | steps clipped |', '|' + '---|' * 15]
    for name, plans in runs.items():
        found = records(plans)
        if not found:
            continue
        accuracy = np.array([record['accuracy'] for record in found])
        low, high = bootstrap(accuracy)
        like = baseline + TWICE_AS_MANY if name.endswith(TWICE_AS_MANY) else baseline # with as many responses
        against = [record['accuracy'] for record in records(runs.get(like, []))]
        wins = [float(a > b) + 0.5 * float(a == b) for a in accuracy for b in against]
        fell = [worst_fall(record) > 0.03 for record in found]
        lines.append(
            f"| {name} | {len(found)} | {interquartile_mean(accuracy):.1%} [{100 * low:.1f}, {100 * high:.1f}] "
            f"| {', '.join(f'{100 * a:.1f}' for a in accuracy)} | {shown(np.mean(wins) if wins else None, '.2f')} "
            f"| {shown(median(r['kl'] for r in found), '.2f')} "
            f"| {shown(median(r['greatest_kl'] for r in found), '.1f')} "
            f"| {at_kl(found)} "
            + ''.join(f"| {shown(median(reached(r, level, column) for r in found), form)} "
                      for column, form in ((0, ',.0f'), (1, '.1f')) for level in (0.85, 0.90))
            + f"| {np.mean([r['minutes'] for r in found]):.1f} | {np.mean(fell):.0%} "
            f"| {np.mean([r['clipped'] for r in found]):.0%} |")
    return '\n'.join(lines)


def two_tables(runs):
    """Return the table of what steps as our A*PO does, and that of the rest, each against its GRPO."""
    ours = [name for name in runs if name.removesuffix(TWICE_AS_MANY) in AS_OURS]
    rest = [name for name in runs if name not in ours]
    return '\n\n'.join(table({name: runs[name] for name in names}, baseline)
                       for names, baseline in ((ours, 'GRPO, as A*PO'), (rest, 'GRPO')) if names)


def plot(runs, path):
    """Draw held-out accuracy against responses and against the root of the KL: a thin line a seed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 5), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    drawn = [name for name, plans in runs.items() if not name.endswith(TWICE_AS_MANY)
             and any(record['kl'] is not None for record in records(plans))] # imitation stays where it is
    for name, color in zip(drawn, itertools.cycle(COLORS + ['black', 'grey', 'brown', 'olive'])):
        for i, record in enumerate(records(runs[name])):
            points = np.array([point for point in record['evaluations'] if point[3] is not None]).reshape(-1, 4)
            axes[0].plot(points[:, 0], points[:, 2], color=color, lw=0.7, alpha=0.7, label=name if i == 0 else None)
            axes[1].plot(np.sqrt(points[:, 3].clip(0)), points[:, 2], color=color, lw=0.7, alpha=0.7)
    axes[0].set(xlabel='responses, those of stage 1 included', ylabel='held-out accuracy')
    axes[1].set(xlabel='square root of the KL to the base')
    for axis in axes:
        axis.grid(alpha=0.3)
    if drawn:
        for line in axes[0].legend(frameon=False).get_lines():
            line.set(lw=2, alpha=1)
        figure.savefig(path, dpi=110)


if __name__ == '__main__':
    main()
