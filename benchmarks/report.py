"""
Write the tables of README.md and RESULTS.md that come from whole runs, and the first figure.

    python benchmarks/report.py --keep out/countdown countdown   # take a run into benchmarks/results/, as ROW-SEED.json
    python benchmarks/report.py                                  # write both pages
    python benchmarks/report.py --check                          # or only say whether they are up to date

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and whatever is there is replaced. A row is of
the runs of one command: means of accuracies, the minutes of the quickest run, which other jobs disturbed least. The
tables `algorithms`, `ablations` and `many_updates` are those of algorithms.py. What another benchmark prints comes
from a file that it was sent to, and then goes to RESULTS.md:

    python benchmarks/search.py > benchmarks/results/search.md
"""
import argparse
import functools
import glob
import json
import os
import statistics
import sys

import numpy as np
from matplotlib.figure import Figure

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [top, os.path.join(top, 'benchmarks')]
from algorithms import (
    ABLATIONS, ALGORITHMS, MANY, at_one_rate, fresh_runs, rates_of, rates_table, records, trials_of, two_tables)
from algorithms import table as table_of_algorithms
from sample import read_log, same_task

RESULTS = os.path.join(top, 'benchmarks', 'results')
SMOLLM2 = 'python train.py --init_from=smollm2'
# The runs' file names up to the seed, what a table calls them, and their command.
ROWS = {
    'countdown': ('countdown: `python train.py`', 'torchrun --nproc_per_node=1 train.py --task=countdown'),
    'countdown_gpu': ('countdown on a GPU, 45.7M parameters: `python train.py`', 'python train.py'),
    'multiplication': (
        'multiplication: `--task=multiplication`', 'torchrun --nproc_per_node=1 train.py --task=multiplication'),
    'others': (
        "others' puzzles: `--max_number=99 --min_target=10 --warmup_steps=8000`",
        'python train.py --max_number=99 --min_target=10 --warmup_steps=8000'),
    'numbers_99': ('numbers to 99, targets from 1', 'python train.py --max_number=99 --warmup_steps=4000'),
    'after_2000': ('countdown after 2,000 steps of warm-up', 'python train.py --warmup_steps=2000'),
    'larger': ('3, 4 and 5 numbers: `--task=examples/larger.py`', 'python train.py --task=examples/larger.py'),
    'searches': ('four searches, 200 tokens', 'python train.py --task=examples/searches.py'),
    'searches_grpo': (
        'four searches, 200 tokens, GRPO', 'python train.py --task=examples/searches.py --algorithm=grpo'),
    'searches_successful': (
        'four searches, only those that end in time, imitation alone',
        'python train.py --task=examples/searches.py --longest=200 --max_steps=0'),
    'chain': ('chain', 'python train.py --task=chain'),
    'equation': ('equation', 'python train.py --task=examples/equation.py'),
    'grid': ('grid', 'python train.py --task=examples/grid.py'),
    'sorting': ('sorting', 'python train.py --task=examples/sorting.py'),
    'smollm2': (
        'SmolLM2-135M on a CPU, products of numbers to 40', f'{SMOLLM2} --task=multiplication --max_factor=40'),
    'smollm2_gpu': (
        'SmolLM2-135M on a GPU, products of numbers to 40',
        f'{SMOLLM2} --task=multiplication --max_factor=40 --learning_rate=2e-5 '
        '--max_new_tokens=64 --max_steps=80 --num_eval_samples=1280 --eval_interval=20'),
    'smollm2_gpu_warm': (
        'SmolLM2-135M on a GPU, products after 100 steps of warm-up',
        f'{SMOLLM2} --task=multiplication --max_factor=40 --warmup_steps=100 --max_steps=80 --eval_interval=20 '
        '--num_eval_samples=1000'),
    'smollm2_gpu_chain': (
        'SmolLM2-135M on a GPU, chain after 100 steps of warm-up',
        f'{SMOLLM2} --task=chain --warmup_steps=100 --max_steps=60 --eval_interval=20 --num_eval_samples=1000')}
HEADLINES = ['countdown', 'countdown_gpu', 'multiplication', 'others', 'smollm2_gpu'] # in README.md
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262} # by the number of seeds
PRINTED = ['search', 'generalisation', 'rollouts', 'steps', 'steps_smollm2', 'steps_equal', 'updates', 'commits',
           'commits_smollm2', 'decoding', 'decoding_gpu', 'decoding_count', 'execution', 'responses',
           'responses_searches', 'growth', 'plan']
PAGES = {'README.md': ['summary'],
         'RESULTS.md': ['runs', 'runs_gpu', 'difficulty', 'steady', 'epsilon', 'ablations', 'many_updates',
                        'algorithms', *PRINTED]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, and fail where a table differs')
    parser.add_argument('--keep', nargs=2, metavar=('OUT_DIR', 'ROW'), help='take a run into benchmarks/results/')
    args = parser.parse_args()
    if args.keep:
        return print(f'wrote {keep(*args.keep)}')
    check, stale = args.check, []
    for page, names in PAGES.items():
        path = os.path.join(top, page)
        with open(path, encoding='utf-8') as file:
            old = file.read()
        new = filled(old, names)
        if new != old and check:
            stale.append(page)
        elif new != old:
            with open(path, 'w', encoding='utf-8') as file:
                file.write(new)
            print(f'wrote {page}')
    if not check:
        draw()
    if stale:
        sys.exit(f"error: {' and '.join(stale)} differ from benchmarks/results: run python benchmarks/report.py")


def filled(page, names):
    """Return a page with the tables of these names as the results give them. Raises ValueError where
    the page has no place for one."""
    for name in names:
        start, end = f'<!-- table {name} -->\n', '<!-- end -->'
        before, found, rest = page.partition(start)
        if not found or end not in rest:
            raise ValueError(f'no place for the table {name}')
        made = printed(name) if name in PRINTED else TABLES[name]()
        page = before + start + '\n' + made + '\n\n' + rest[rest.index(end):]
    return page


def printed(name):
    """Return what a benchmark has printed."""
    with open(os.path.join(RESULTS, f'{name}.md'), encoding='utf-8') as file:
        return file.read().strip()


def keep(folder, name):
    """Take the summary of a run into benchmarks/results/, with what metrics.jsonl says of its steadiness: how far an
    evaluation on the way fell below an earlier one, the greatest KL of a step to the base, and how far the mean of ten
    rewards fell below its best before. Returns the file's path. One line and exit where there is no such row, or no
    run of its task that has ended."""
    source = os.path.join(folder, 'results_summary.json')
    if name not in ROWS:
        sys.exit(f"error: there is no row {name!r}, only {', '.join(ROWS)}")
    if not os.path.exists(source):
        sys.exit(f'error: {folder} holds no run that has come to its end')
    with open(source, encoding='utf-8') as file:
        summary = json.load(file)
    named = [word.partition('=')[2] for word in ROWS[name][1].split() if word.startswith('--task=')] or ['countdown']
    if not same_task(summary['task'], named[0]):
        sys.exit(f"error: {folder} is a run of {summary['task']}, the row {name} is of {named[0]}")
    rows = read_log(os.path.join(folder, 'metrics.jsonl'))
    steps, warm = [row for row in rows if 'kl' in row], summary['settings']['warmup_steps']
    evaluations = [row for row in rows if row['phase'] == 'evaluation' and row['step'] >= warm]
    summary['accuracy_by_difficulty_after_warmup'] = evaluations[0]['by_difficulty']
    if steps:
        # Evaluations on the way are of the same eighth of the problems.
        on_the_way = [row['accuracy'] for row in evaluations[1:-1]]
        rewards = np.convolve([row['reward'] for row in steps], np.full(10, 0.1), 'valid')
        summary['steadiness'] = dict(
            evaluation_fall=worst_fall(on_the_way), greatest_kl=max(row['base_kl'] for row in steps),
            reward_fall=worst_fall(rewards))
    summary['settings'].pop('out_dir') # a folder of the machine that ran it
    path = os.path.join(RESULTS, f"{name}-{summary['settings']['seed']}.json")
    with open(path, 'w', encoding='utf-8') as file:
        file.write(json.dumps(summary, indent=2) + '\n')
    return path


def worst_fall(series):
    """Return how far one of these numbers lies below an earlier one, at most."""
    return float(max([0.0, *(before - after for i, after in enumerate(series) for before in series[:i])]))


def runs_of(row):
    """Return the summaries of a row's runs, by seed. One line and exit where there are none."""
    paths = glob.glob(os.path.join(RESULTS, f'{row}-*.json'))
    summaries = []
    for path in sorted(paths, key=lambda path: int(path.rpartition('-')[2].removesuffix('.json'))):
        with open(path, encoding='utf-8') as file:
            summaries.append(json.load(file))
    if not summaries:
        sys.exit(f'error: {RESULTS} has no {row}-SEED.json')
    return summaries


def table(heads, rows):
    """Return a table in Markdown."""
    lines = [heads, ['---'] * len(heads), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def percent(x):
    return f'{100 * x:.1f}%'


def spread(values):
    """Return the mean of accuracies with its 95% interval over seeds (Student's t), and from where to
    where they go."""
    text = f'**{percent(statistics.mean(values))}**'
    if len(values) in STUDENT:
        text += f' ± {100 * STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.1f}'
    return text if len(values) == 1 else f'{text} ({100 * min(values):.1f} to {100 * max(values):.1f})'


def place(run):
    """Name the machine of a run, as far as it is known."""
    if run['device'].startswith('cuda'):
        return run.get('machine') or 'GPU'
    return f"{run['threads']} core{'s' * (run['threads'] > 1)}"


# The tables, each under its name in TABLES.

def summary():
    rows = []
    for name in HEADLINES:
        runs = runs_of(name)
        before = statistics.mean(run['accuracy_after_warmup'] for run in runs)
        quickest = min(runs, key=lambda run: run['seconds']) # other jobs disturbed it least
        rows.append([ROWS[name][0], percent(before), spread([run['accuracy'] for run in runs]), len(runs),
                     f"{quickest['seconds'] / 60:.0f}, {place(quickest)}"])
    return table(['task', 'after the warm-up', 'after A\\*PO', 'seeds', 'minutes, machine'], rows)


def every_run(on_gpu):
    rows = []
    for name in [name for name in ROWS if ('_gpu' in name) == on_gpu]:
        for run in runs_of(name):
            low, high = run['interval_95']
            rows.append([f'`{ROWS[name][1]}`', run['settings']['seed'], percent(run['accuracy_after_warmup']),
                         percent(run['accuracy']), f'{100 * low:.1f} to {100 * high:.1f}', f"{run['length']:.0f}",
                         percent(run['truncated']), f"{run['seconds'] / 60:.1f}, {place(run)}",
                         (run['git_commit'] or '')[:7]])
    heads = ['command', 'seed', 'after the warm-up', 'at the end', '95% interval', 'tokens', 'cut off',
             'minutes, machine', 'commit']
    return table(heads, rows)


def difficulty():
    rows = []
    for name in ROWS:
        runs = runs_of(name)
        bases = [run.get('accuracy_by_difficulty_after_warmup') for run in runs] # of some runs the log is gone
        for group in runs[0]['accuracy_by_difficulty']:
            before = percent(statistics.mean(base[group] for base in bases)) if all(bases) else ''
            rows.append([ROWS[name][0], group, before,
                         spread([run['accuracy_by_difficulty'][group] for run in runs])])
    return table(['runs', 'problems', 'after the warm-up', 'at the end'], rows)


def steady():
    rows = []
    for name in ROWS:
        for run in runs_of(name):
            if 'steadiness' not in run:
                continue
            start, end, how = run['accuracy_after_warmup'], run['accuracy'], run['steadiness']
            within = [end >= start, how['evaluation_fall'] <= 0.03, how['greatest_kl'] < 5, how['reward_fall'] <= 0.05]
            rows.append([ROWS[name][0], run['settings']['seed'], f'{percent(start)}, {percent(end)}',
                         f"{100 * how['evaluation_fall']:.1f} points", f"{how['greatest_kl']:.1f}",
                         f"{how['reward_fall']:.3f}", 'yes' if all(within) else 'no'])
    return table(['runs', 'seed', 'accuracy: base, end', 'worst fall between evaluations', 'greatest KL',
                  'worst fall of the reward', 'within all bounds'], rows)


def comparison():
    trials = trials_of(ALGORITHMS)
    return two_tables(fresh_runs(ALGORITHMS, trials)) + '\n\n' + rates_table(trials, ALGORITHMS)


def one_rate(rows):
    """Return the table of rows that have one rate each."""
    return table_of_algorithms(at_one_rate(rows), baseline='A*PO')


def epsilon():
    rows, trials = [], trials_of(ALGORITHMS)
    for name, eps in (('A*PO, plain AdamW', '1e-8'), ('A*PO', '1e-2')):
        for rate in rates_of(ALGORITHMS[name]):
            found = records(trials[name, rate])
            on_the_way = [[point[2] for point in record['evaluations']] for record in found] # every 8 steps
            columns = [[points[1] for points in on_the_way], [points[2] for points in on_the_way],
                       [record['accuracy'] for record in found]]
            rows.append([eps, rate, *(', '.join(map(percent, column)) for column in columns)])
    return table(['epsilon', 'rate', 'after 8 steps', 'after 16', 'at the end'], rows)


def draw():
    """Draw the accuracy of the countdown runs against minutes, the least disturbed ones in bold."""
    figure = Figure(figsize=(8, 3.6), layout='constrained')
    axis = figure.subplots()
    for name, color, label in (('countdown', '#0072B2', '0.8M parameters on two CPU cores; thin: one busy core'),
                               ('countdown_gpu', '#E69F00', '45.7M parameters on a busy H200')):
        quickest = min(runs_of(name), key=lambda run: run['seconds'])
        for run in runs_of(name):
            warm, bold = run['settings']['warmup_steps'], run == quickest
            points = [(seconds / 60, 100 * accuracy, step > warm) for step, seconds, accuracy in run['evaluations']]
            axis.plot(*zip(*[point[:2] for point in [(0, 0, False)] + points]), color=color, lw=1.8 if bold else 0.8,
                      alpha=1 if bold else 0.4)
            for minutes, accuracy, trained in points if bold else points[-1:]:
                axis.plot(minutes, accuracy, 'o', color=color, ms=4.5, mfc=color if trained else 'white')
        axis.plot([], [], color=color, label=label)
    axis.plot([], [], 'o', color='gray', mfc='white', label='warm-up: imitation')
    axis.plot([], [], 'o', color='gray', label='A*PO')
    axis.set(xlabel='minutes', ylabel='held-out puzzles solved, %', ylim=(0, 102), xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(loc='lower right')
    figure.savefig(os.path.join(top, 'assets', 'countdown.png'), dpi=110)


TABLES = dict(
    summary=summary, runs=functools.partial(every_run, on_gpu=False),
    runs_gpu=functools.partial(every_run, on_gpu=True), difficulty=difficulty, steady=steady, epsilon=epsilon,
    ablations=functools.partial(one_rate, ABLATIONS), many_updates=functools.partial(one_rate, MANY),
    algorithms=comparison)


if __name__ == '__main__':
    main()
