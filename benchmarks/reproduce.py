"""
Repeat the runs behind the tables of README.md and RESULTS.md: each row's command with its seeds, one after another.

    python benchmarks/reproduce.py --dry_run                       # what would run, and for how long
    python benchmarks/reproduce.py                                 # every row that this machine can run
    python benchmarks/reproduce.py countdown multiplication        # these rows, ROWS of report.py has all
    python benchmarks/reproduce.py countdown --seeds 11 12 --keep  # other seeds, into benchmarks/results/ too

The runs are in out/reproduce/ROW-SEED: one that has ended there is not repeated, one that was stopped is resumed.
So the command can be stopped, by Ctrl-C too, and given again. smollm2 is the folder that examples/smollm2.py makes.
Each new accuracy is printed beside the old one. The comparison of algorithms is benchmarks/algorithms.py.
With --keep the summaries replace those in benchmarks/results/, of which `python benchmarks/report.py` makes the tables.
"""
import argparse
import glob
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys

import torch

from algorithms import remove_stopped
from report import ROWS, keep, runs_of, top


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', nargs='*', metavar='ROW', help=f"of {', '.join(ROWS)}")
    parser.add_argument('--seeds', nargs='+', type=int, help='instead of those of the row')
    parser.add_argument('--keep', action='store_true', help='copy the summaries into benchmarks/results/')
    parser.add_argument('--dry_run', action='store_true', help='only say what there is to do')
    args = parser.parse_args()
    for row in args.rows:
        if row not in ROWS:
            parser.error(f"there is no row {row!r}, only {', '.join(ROWS)}")
    os.chdir(top)
    runs = dict.fromkeys((row, seed) for row in args.rows or ROWS if args.rows or runs_here(row)
                         for seed in args.seeds or seeds_of(row))
    failed = []
    todo = [run for run in runs if not os.path.exists(os.path.join(folder_of(*run), 'results_summary.json'))]
    minutes = sum(map(minutes_of, todo))
    print(f'{len(todo)} of {len(runs)} runs to do, about {minutes / 60:.1f} hours at the speed of the runs in '
          'benchmarks/results/', flush=True)
    for row, seed in runs:
        if args.dry_run:
            print(f"{'to do' if (row, seed) in todo else 'done'}  {row} {seed}: {minutes_of((row, seed)):.0f} min")
            continue
        if (row, seed) in todo:
            print(f'{row}, seed {seed}: about {minutes_of((row, seed)):.0f} min', flush=True)
            if not take(ROWS[row][1], seed, folder_of(row, seed)):
                failed.append(f'{row} {seed}')
                continue
        compare(row, seed)
        if args.keep:
            keep(folder_of(row, seed), row)
    if failed:
        sys.exit(f"error: {', '.join(failed)} did not end, for the reasons above")


def folder_of(row, seed):
    return os.path.join('out', 'reproduce', f'{row}-{seed}')


def runs_here(row):
    """Say whether a row was run on the kind of machine that this is."""
    return runs_of(row)[0]['device'].startswith('cuda') == torch.cuda.is_available()


def seeds_of(row):
    return [run['settings']['seed'] for run in runs_of(row)]


def minutes_of(run):
    """Return what a run of this row has taken."""
    return statistics.median([run['seconds'] / 60 for run in runs_of(run[0])])


def take(command, seed, folder):
    """Take the run of a command, or continue it, and say whether it came to its end. A signal to stop goes to the run,
    which saves itself, and ends this program too."""
    words = shlex.split(command.partition('train.py')[2]) + [f'--seed={seed}']
    if glob.glob(os.path.join(folder, 'checkpoint_step_*.pt')):
        words += ['--init_from=resume'] # the last one counts; a task that is a file has to be named again
    else: # it may have been killed before it saved anything
        remove_stopped(folder)
    run = subprocess.Popen([sys.executable, 'train.py', *words, f'--out_dir={folder}'], start_new_session=True)
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stopped.append(number), run.send_signal(number)))
    run.wait()
    if stopped:
        sys.exit('stopped: the same command continues')
    return run.returncode == 0


def compare(row, seed):
    """Print what a run came to beside the accuracy on the pages."""
    with open(os.path.join(folder_of(row, seed), 'results_summary.json')) as file:
        new = json.load(file)
    old = [f"{run['accuracy']:.1%}" for run in runs_of(row) if run['settings']['seed'] == seed]
    print(f"{row}, seed {seed}: {new['accuracy']:.1%}, on the pages {old[0] if old else 'not there'}", flush=True)


if __name__ == '__main__':
    main()
