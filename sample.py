"""
See what a trained model does.

    python sample.py                                  # five held-out problems, then yours, line by line
    python sample.py --prompt="3 5 7 = 22" --num_samples=16
    python sample.py --eval                           # grade the held-out problems
    python sample.py --plot out/countdown out/other   # curves of several runs over each other
    python sample.py --export=folder                  # the model in the Hugging Face layout, which transformers loads

Takes the newest run under out/, one that came to its end before one that did not, else assets/countdown_trained.pt;
--checkpoint=PATH names another, a file or the folder of a run.
"""
import argparse
import glob
import json
import math
import os
import sys

import train
from model import save_pretrained
from tasks import END_THINK, extract_answer

HERE = os.path.dirname(os.path.abspath(__file__))
INDENT = '\n' + 10 * ' '
COLORS = ['#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9'] # Okabe and Ito: told apart by everyone


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--checkpoint', help='a checkpoint, or the folder of a run (default: see above)')
    parser.add_argument('--prompt', help='one problem, such as "3 5 7 = 22" or "47 * 36"')
    parser.add_argument('--eval', action='store_true',
                        help='grade held-out problems and write sample_eval.json beside the checkpoint')
    parser.add_argument('--num_problems', type=int, default=0,
                        help='held-out problems to draw (default: 5, or 2000 with --eval)')
    parser.add_argument('--num_samples', type=int, default=1, help='responses to each problem')
    parser.add_argument('--temperature', type=float, help='0 is greedy (default: the eval_temperature of the run)')
    parser.add_argument('--max_new_tokens', type=int, help='longest response (default: that of the run)')
    parser.add_argument('--seed', type=int, default=1337, help='of the sampling noise')
    parser.add_argument('--device', default='auto', help='auto | cpu | cuda | mps')
    parser.add_argument('--export', metavar='FOLDER', help='write the model in the Hugging Face layout and exit')
    parser.add_argument('--plot', nargs='+', metavar='OUT_DIR', help='draw the curves of these runs and exit')
    parser.add_argument('--output', default='curves.png', help='the picture that --plot writes')
    args = parser.parse_args()
    if args.plot:
        with train.one_line('--plot'):
            plot_runs(args.plot, args.output)
        return print(f'wrote {args.output}')
    if args.eval and args.prompt is not None:
        train.fail("--eval grades held-out problems, --prompt asks one: choose")
    if args.num_samples < 1 or args.max_new_tokens is not None and args.max_new_tokens < 1 \
            or min(args.num_problems, args.seed) < 0 or not 0 <= (args.temperature or 0) < math.inf:
        train.fail("--num_samples and --max_new_tokens must be at least 1, "
                   "--num_problems, --seed and --temperature at least 0")

    path = args.checkpoint or train.newest_model(os.path.join('out', '*')) or f'{HERE}/assets/countdown_trained.pt'
    path = train.newest_model(glob.escape(path)) or path # where it is the folder of a run
    run = train.load_run(path, seed=args.seed, device=args.device,
                         **({'max_new_tokens': args.max_new_tokens} if args.max_new_tokens else {}))
    temperature = train.eval_temperature if args.temperature is None else args.temperature
    if args.export:
        return export(run, args.export)
    print(f'{path}: {train.task}, {run.model.num_params():,} parameters, step {run.step}, temperature {temperature}')
    if args.eval:
        return evaluate(run, path, args.num_problems or 2000, args.num_samples, temperature)
    problems = [parse(run, args.prompt)] if args.prompt is not None else \
        train.held_out_problems(run.task, args.num_problems or 5)
    show(run, problems, args.num_samples, temperature)
    if args.prompt is None and sys.stdin.isatty():
        play(run, args.num_samples, temperature)


def parse(run, text):
    """A typed problem, or one line that says what is wrong with it."""
    try:
        problem = run.task.parse(text)
        length = len(run.tokenizer.encode(run.task.prompt(problem)))
    except ValueError as error:
        train.fail(str(error))
    if length + train.max_new_tokens > run.model.config.max_seq_len:
        train.fail(f"this problem's {length} tokens and --max_new_tokens={train.max_new_tokens} do not fit the "
                   "model's positions")
    return problem


def show(run, problems, num_samples, temperature):
    """Responses with the verifier's verdict; with several problems or samples a summary line."""
    live = len(problems) == num_samples == 1 # a single response is printed while it is being sampled
    if live:
        show_problem(run, problems[0])
    stream = Stream(run.tokenizer)
    batch, _ = train.rollout(run, problems, train.EVAL, temperature, num_samples, stream if live else None)
    verdicts = batch['correct'].view(-1, num_samples).sum(1).int().tolist()
    for i, (problem, solved) in enumerate(zip(problems, verdicts)):
        rows = range(i * num_samples, (i + 1) * num_samples)
        best = max(rows, key=lambda row: batch['reward'][row].item())
        truncated, answer = bool(batch['truncated'][best]), extract_answer(batch['texts'][best])
        if not live:
            show_problem(run, problem)
        print(batch['texts'][best].partition(END_THINK)[0][stream.printed:].replace('\n', INDENT), end='')
        print(f'\nanswer    {"none" if answer is None else answer}')
        verdict = 'correct' if batch['correct'][best] else \
            f'cut off after {train.max_new_tokens} tokens' if truncated else \
            ': '.join(filter(None, ('wrong', run.task.explain(problem, answer)))) if batch['formatted'][best] else \
            'not in the format'
        print(f'verdict   {verdict}' +
              (f'; {solved} of {num_samples} samples correct, the best is shown' if num_samples > 1 else ''))
    if len(problems) > 1 or num_samples > 1:
        print('\n' + summary_line(verdicts, num_samples))


def show_problem(run, problem):
    print('\nproblem   ' + run.task.prompt(problem).removesuffix('<think>').replace('\n', INDENT))
    if remark := run.task.remark(problem):
        print(f'          ({remark})')
    print('thinking  ', end='')


class Stream:
    """Prints a response's thinking token by token; generate calls it with all the tokens so far."""

    def __init__(self, tokenizer):
        self.tokenizer, self.printed = tokenizer, 0

    def __call__(self, tokens):
        text = self.tokenizer.decode(tokens.tolist())
        # What may yet become the tag that ends it, or a whole letter, is held back.
        thinking = text.partition(END_THINK)[0] if END_THINK in text else text[:-len(END_THINK)]
        print(thinking[self.printed:].replace('\n', INDENT), end='', flush=True)
        self.printed = max(self.printed, len(thinking))


def pass_at_k(verdicts, n, k):
    """The share of problems that k responses solve, from how many of n did (the unbiased estimate of arXiv
    2107.03374)."""
    return sum(1 - math.comb(n - solved, k) / math.comb(n, k) for solved in verdicts) / len(verdicts)


def summary_line(verdicts, n):
    """Accuracy, and pass@k for the powers of two up to n."""
    line = f'{len(verdicts)} problem(s) x {n} response(s): accuracy {sum(verdicts) / len(verdicts) / n:.3f}'
    return line + ''.join(f', pass@{2 ** i} {pass_at_k(verdicts, n, 2 ** i):.3f}' for i in range(1, n.bit_length()))


def play(run, num_samples, temperature):
    """Answer what is typed, until an empty line."""
    while text := input('\na problem of yours (empty line to leave): ').strip():
        try:
            show(run, [parse(run, text)], num_samples, temperature)
        except SystemExit as error:
            print(error)


def evaluate(run, path, count, num_samples, temperature):
    """Grade held-out problems; the numbers also go to sample_eval.json beside the checkpoint."""
    problems = train.held_out_problems(run.task, count)
    result, rows = train.evaluate(run, problems, temperature, num_samples)
    verdicts = [int(sum(row['correct'] for row in rows[i:i + num_samples])) for i in range(0, len(rows), num_samples)]
    print(summary_line(verdicts, num_samples))
    print(', '.join(f'{group} {accuracy:.3f}' for group, accuracy in result['by_difficulty'].items()))
    target = os.path.join(os.path.dirname(path), 'sample_eval.json')
    with open(target, 'w') as file:
        json.dump(dict(checkpoint=path, task=train.task, temperature=temperature, num_problems=len(verdicts),
                       num_samples=num_samples, **result), file, indent=2)
    print(f'wrote {target}')


def export(run, folder):
    """The model as config.json and model.safetensors, and the files of a pretrained model's tokenizer; our own
    vocabularies have no place in that layout."""
    files = run.tokenizer.state if isinstance(run.tokenizer.state, dict) else {}
    if os.path.exists(folder):
        train.fail(f"{folder} is there already: choose a new folder for the export")
    with train.one_line(folder):
        save_pretrained(run.model, folder, run.tokenizer.eos)
        for name in files.keys() - {'config.json'}: # which it wrote for itself
            with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
                file.write(files[name])
    print(f"wrote {', '.join(sorted(os.listdir(folder)))} to {folder}")


def plot_runs(folders, path):
    """Reward and held-out accuracy against wall time and against steps, response length, KL, runs over each other; of
    the first one accuracy by difficulty, and where the time goes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 7), layout='constrained')
    by_time, by_step, length, by_difficulty, kl, seconds = figure.subplots(2, 3).flat
    names = [os.path.basename(os.path.normpath(folder)) for folder in folders]
    for folder, name, color in zip(folders, names, COLORS * len(folders)):
        lines = open(os.path.join(folder, 'metrics.jsonl')).readlines()
        rows = [json.loads(line) for line in lines if line.endswith('\n')] # a crash may have cut the last one
        steps = [row for row in rows if 'reward' in row and row['phase'] != 'evaluation']
        evaluations = [row for row in rows if row['phase'] == 'evaluation']
        warm_up = [row for row in rows if row['phase'] == 'warm-up']
        first = warm_up[-1] if warm_up else dict(step=0, seconds=0) # what stage 2 counts from
        minutes, number = lambda row: row['seconds'] / 60, lambda row: row['step'] - first['step']
        for axis, x, since in ((by_time, minutes, 0), (by_step, number, first['step'])):
            axis.plot([*map(x, steps)], [row['reward'] for row in steps], color=color, alpha=0.35, lw=1)
            later = [row for row in evaluations if row['step'] >= since]
            axis.plot([*map(x, later)], [row['accuracy'] for row in later], 'o-', color=color, label=name)
        for axis, metric in ((length, 'length'), (kl, 'kl')) if steps else ():
            axis.plot([*map(number, steps)], [row[metric] for row in steps], color=color, label=name)
        if folder == folders[0]:
            for axis in (by_time, by_difficulty):
                axis.axvspan(0, minutes(first), color=color, alpha=0.08, lw=0)
            for group, shade in zip(evaluations[-1]['by_difficulty'] if evaluations else [], COLORS):
                accuracy = [row['by_difficulty'].get(group) for row in evaluations]
                by_difficulty.plot([*map(minutes, evaluations)], accuracy, 'o-', color=shade, label=group)
            parts = [[row['seconds_' + part] for row in steps] for part in train.PARTS]
            seconds.stackplot([*map(number, steps)], parts, labels=train.PARTS, colors=COLORS, alpha=0.7)
    for axis, title in zip(figure.axes, (
            'held-out accuracy (dots), training reward (thin)', 'the same by steps', 'response length, tokens',
            f'held-out accuracy by difficulty ({names[0]})', 'KL to the reference', f'seconds per step ({names[0]})')):
        axis.set(title=title, xlabel=f'minutes (shaded: warm-up of {names[0]})' if axis in (by_time, by_difficulty)
                 else 'steps of stage 2')
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0] and (axis in (by_difficulty, seconds) or len(folders) > 1):
            axis.legend(framealpha=0.6, edgecolor='none')
    for axis in (by_time, by_step, by_difficulty):
        axis.set_ylim(0, 1.02) # or dots at 1 are cut in half
    figure.savefig(path, dpi=100)


if __name__ == '__main__':
    try:
        main()
    except (EOFError, KeyboardInterrupt): # how people leave a prompt
        print()
    except BrokenPipeError: # whoever read this, like head, has read enough
        os._exit(0)
    except OSError as error:
        train.fail(f'{error.filename}: {error.strerror}')
    except RuntimeError as error:
        if not train.out_of_memory(error):
            raise
        train.fail('out of memory: lower --num_samples, --num_problems or --max_new_tokens')
