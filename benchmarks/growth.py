"""
How the cost of a step of A*PO grows with the batch, the length of the responses and the model, and
what it needs of memory: one of the three at a time, from random weights, with responses that never
end before the limit.

    python benchmarks/growth.py                    # on this machine; two cores: 5 minutes
    python benchmarks/growth.py --device=cuda      # what else is given goes to train.py

Every row is a process of its own, so that its peak of memory is its own (resident memory of the
whole process on a CPU, torch's peak on a GPU). The times are medians of 3 steps after one to warm
up. Linear is what the dashed lines show; attention's share grows with the square of the length.
Draws growth.png, which assets/ holds as of two cores.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys

import torch

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
import train

START = dict(batch_size=64, max_new_tokens=200, d_model=128)
ROWS = [START | {name: value} for name, values in dict(
    batch_size=(16, 32, 64, 128, 256), max_new_tokens=(50, 100, 200, 400, 800), d_model=(64, 128, 256, 512),
).items() for value in values]
COLUMNS = ('parameters', 'rollout', 'update', 'memory')


def one(arguments):
    """Take the steps of one row. Prints its COLUMNS: a number, seconds, seconds, GB."""
    run = train.build(*train.configure(arguments))
    run.base = run.reference = train.frozen_copy(run.model)
    run.optimizers = train.make_optimizers(run.model, train.learning_rate, eps=train.adam_eps)
    never_end(run)
    steps = [train.policy_step(run) for _ in range(4)][1:]
    rollout, update = (statistics.median(step[f'seconds_{first}'] + step[f'seconds_{second}'] for step in steps)
                       for first, second in (('rollout', 'grading'), ('reference', 'update')))
    memory = torch.cuda.max_memory_allocated() if run.settings['device'].startswith('cuda') else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print('RESULT', run.model.num_params(), rollout, update, memory / 1e9)


def never_end(run):
    """Let no response end before the limit: in the copy that responds, end-of-sequence gets a logit
    of -inf. The policy itself, which scores the responses, stays as it is."""
    ends = torch.tensor(run.tokenizer.ends, device=run.settings['device'])
    run.rollout_model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, ends, -torch.inf))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    more = parser.parse_known_args()[1] # settings for train.py
    print('| batch | tokens a response | width | parameters | sampling, s | reference and update, s | memory |\n'
          '|---|---|---|---|---|---|---|', flush=True)
    found = {}
    for row in ROWS:
        key = tuple(row.values())
        if key not in found: # each of the three passes through START
            settings = row | dict(n_layers=4, n_heads=row['d_model'] // 32, n_kv_heads=row['d_model'] // 64,
                                  d_ff=3 * row['d_model'], warmup_steps=0, max_steps=100,
                                  learning_rate=1e-6, out_dir=f'out/growth_{os.getpid()}')
            said = subprocess.run([sys.executable, __file__, 'one', *(f'--{k}={v}' for k, v in settings.items()),
                                   *more], capture_output=True, text=True)
            if said.returncode:
                sys.exit(said.stderr)
            found[key] = dict(zip(COLUMNS, map(float, said.stdout.split('RESULT')[1].split())))
            batch, length, width = key
            parameters, rollout, update, memory = found[key].values()
            print(f'| {batch} | {length} | {width} | {parameters / 1e6:.1f} M | {rollout:.2f} | {update:.2f} '
                  f'| {memory:.2f} GB |', flush=True)
    plot(found)


def plot(found):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from sample import COLORS
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout='constrained', sharey=True)
    for axis, name in zip(axes, START):
        rows = [row for row in ROWS if all(row[other] == START[other] for other in START if other != name)]
        x = [found[tuple(row.values())]['parameters'] / 1e6 if name == 'd_model' else row[name] for row in rows]
        x, rows = zip(*sorted(dict(zip(x, rows)).items()))
        for part, color in zip(('rollout', 'update'), COLORS):
            y = [found[tuple(row.values())][part] for row in rows]
            axis.plot(x, y, 'o-', color=color, label=dict(rollout='sampling', update='reference and update')[part])
            axis.plot(x, [y[-1] * value / x[-1] for value in x], '--', color=color, lw=0.8)
        axis.set(xscale='log', yscale='log', xlabel=dict(
            batch_size='responses', max_new_tokens='tokens a response', d_model='million parameters')[name])
        axis.set_xticks(x, [f'{value:.2g}' if name == 'd_model' else value for value in x])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel='seconds of a step (dashed: linear)')
    axes[0].legend(frameon=False)
    figure.savefig('growth.png', dpi=100)


if __name__ == '__main__':
    one(sys.argv[2:]) if sys.argv[1:2] == ['one'] else main()
