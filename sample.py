"""
See what a trained model does.

    python sample.py                                  # five held-out problems, then yours, line by line
    python sample.py --prompt="3 5 7 = 22" --num_samples=16
    python sample.py --eval                           # grade the held-out problems
    python sample.py --plot out/countdown out/other   # curves of several runs over each other
    python sample.py --export=folder                  # the model in the Hugging Face layout, which transformers loads

Takes the newest run under out/, one that came to its end before one that did not, else assets/countdown_trained.pt;
--checkpoint=PATH names another, a file or the folder of a run.

Training stands on this file: `respond` samples responses and grades them, in training and evaluation alike, and is the
one place where rewards are decided. Everything takes its settings as arguments.
"""
import argparse
import contextlib
import functools
import glob
import inspect
import json
import math
import os
import re
import sys
import time
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from model import ModelConfig, Transformer, generate, save_pretrained
from tasks import END_THINK, EOS, WRONG, PretrainedTokenizer, Tokenizer, extract_answer, find_task

HERE = os.path.dirname(os.path.abspath(__file__))
FORMAT = 'tinyzero-astarpo 1' # what a checkpoint of ours says of itself
WARMUP, STAGE1, TRAIN, EVAL = range(4) # streams of random numbers
PARTS = ('rollout', 'reference', 'update', 'grading') # of a step of A*PO, timed
INDENT = '\n' + 10 * ' '
COLORS = ['#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9'] # Okabe and Ito: told apart by everyone


# --------------------------------------------------------------------------------------------------------------------
# Respond and grade

class Batch(NamedTuple):
    """Graded responses, B of them."""
    tokens: torch.Tensor # (B, T), each row its prompt, its response and padding
    mask: torch.Tensor # (B, T), True on the response up to and including its end
    reward: torch.Tensor # (B,), as the next four
    correct: torch.Tensor
    formatted: torch.Tensor
    truncated: torch.Tensor # the response did not end within max_new_tokens
    length: torch.Tensor # tokens of the response
    problems: list
    texts: list # the responses, without their end
    seconds: dict # that sampling and grading took


GRADES = ('reward', 'correct', 'formatted', 'truncated', 'length')


def respond(model, task, tokenizer, problems, key, repeat=1, *, max_new_tokens, temperature, rollout_rows=1024,
            watch=None, progress=''):
    """
    Sample `repeat` responses to each problem, rollout_rows side by side, and grade them. This is the one place where
    rewards are decided: a response that did not end within max_new_tokens is truncated, its reward 0.

    key: integers that the sampling noise follows from. watch: see model.generate. progress: what this work is called
    in the lines that say how long it still takes, none where that is empty. Returns a Batch.
    """
    started, device = time.time(), model.embed.weight.device
    problems = [problem for problem in problems for _ in range(repeat)]
    prompts = [tokenizer.encode(tokenizer.prompt(task, problem)) for problem in problems]
    pieces = []
    for first in range(0, len(prompts), rollout_rows):
        state = np.random.SeedSequence((*key, first)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
        uniform = torch.rand(len(prompts[first:first + rollout_rows]), max_new_tokens, generator=generator,
                             device=device)
        pieces.append(generate(model, prompts[first:first + rollout_rows], max_new_tokens, temperature, tokenizer.ends,
                               uniform, watch))
        done, spent = min(first + rollout_rows, len(prompts)), time.time() - started
        if progress and spent > 10 and done < len(prompts): # many long responses take minutes
            left = spent / 60 * (len(prompts) / done - 1)
            print(f'{progress}: {done:,} of {len(prompts):,} responses, {left:.1f} min left', flush=True)
    tokens = pad_sequence([row for piece, _ in pieces for row in piece], True, tokenizer.ends[0]) # (B, T)
    mask = pad_sequence([row for _, piece in pieces for row in piece], True)

    sampled, grades, texts = time.time(), [], []
    for problem, row, marked in zip(problems, tokens.cpu().numpy(), mask.cpu().numpy()):
        response = row[marked]
        truncated = response[-1] not in tokenizer.ends
        text = tokenizer.decode(response.tolist()).removesuffix(EOS)
        grade = WRONG if truncated else task.grade(problem, text)
        grades.append((*grade, truncated, len(response)))
        texts.append(text)
    columns = torch.tensor(grades, dtype=torch.float32, device=device).T # GRADES
    seconds = dict(rollout=sampled - started, grading=time.time() - sampled)
    return Batch(tokens, mask, *columns, problems, texts, seconds)


def evaluate(model, task, tokenizer, problems, key, repeat=1, **options):
    """Grade `repeat` responses to each problem, with the options of respond. Returns a dict for every response."""
    batch = respond(model, task, tokenizer, problems, key, repeat, **options)
    rows = []
    for i, problem in enumerate(batch.problems):
        grades = {name: getattr(batch, name)[i].item() for name in GRADES}
        rows.append(dict(grades, difficulty=task.difficulty(problem), prompt=tokenizer.prompt(task, problem),
                         response=batch.texts[i]))
    return rows


def summarize(rows):
    """Summarize the rows of evaluate: accuracy with its Wilson 95% interval and by difficulty, and other means."""
    def mean(name, rows):
        return sum(row[name] for row in rows) / len(rows)
    n, p, z = len(rows), mean('correct', rows), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    groups = {group: [row for row in rows if row['difficulty'] == group]
              for group in sorted({row['difficulty'] for row in rows})}
    return dict(accuracy=p, interval_95=interval, count=n,
                by_difficulty={group: mean('correct', members) for group, members in groups.items()},
                **{name: mean(name, rows) for name in GRADES if name != 'correct'})


@functools.lru_cache(maxsize=1) # drawing 2,000 takes a second
def held_out_problems(task, count):
    """Return `count` different problems of the test split, or all there are: the same in every run, whatever its
    seed."""
    rng, found, since = np.random.default_rng((EVAL, 2025)), {}, 0
    while len(found) < count and since < 5000:
        problem = task.draw(rng, test=True)
        since = 0 if task.canonical(problem) not in found else since + 1
        found.setdefault(task.canonical(problem), problem)
    return list(found.values())


def pass_at_k(verdicts, n, k):
    """Estimate the share of problems that k responses solve, from how many of n did (arXiv 2107.03374, unbiased)."""
    return sum(1 - math.comb(n - solved, k) / math.comb(n, k) for solved in verdicts) / len(verdicts)


# --------------------------------------------------------------------------------------------------------------------
# The command line

def main():
    args = parse_arguments()
    if args.plot:
        with one_line('--plot'):
            plot_runs(args.plot, args.output)
        return print(f'wrote {args.output}')
    path = args.checkpoint or newest_model(os.path.join('out', '*')) or f'{HERE}/assets/countdown_trained.pt'
    path = os.path.expanduser(path)
    path = newest_model(glob.escape(path)) or path # where it is the folder of a run
    checkpoint = load_checkpoint(path)
    models = model, task, tokenizer = load(checkpoint, path, args.device, args.task, args.max_new_tokens)
    if args.export:
        return export(model, tokenizer, os.path.expanduser(args.export))
    settings = checkpoint['settings']
    temperature = settings['eval_temperature'] if args.temperature is None else args.temperature
    options = dict(key=(args.seed, EVAL, checkpoint['step'], 0), repeat=args.num_samples, temperature=temperature,
                   max_new_tokens=args.max_new_tokens or settings['max_new_tokens'], progress='sampling')
    print(f"{path}: {checkpoint['task']}, {model.num_params():,} parameters, step {checkpoint['step']}, "
          f"temperature {temperature}")
    if args.eval:
        return grade_held_out(models, options, path, args.num_problems or 2000)
    with one_line('this problem', ValueError):
        problems = held_out_problems(task, args.num_problems or 5) if args.prompt is None else [task.parse(args.prompt)]
        show(models, options, problems)
    while args.prompt is None and sys.stdin.isatty():
        text = input('\na problem of yours (empty line to leave): ').strip()
        if not text:
            break
        try:
            show(models, options, [task.parse(text)])
        except ValueError as error:
            print(error)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    parser.add_argument('--checkpoint', help='a checkpoint, or the folder of a run (default: see above)')
    parser.add_argument('--task', default='', help="the file of the model's task, where it is not one of tasks.py")
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
    if args.eval and args.prompt is not None:
        fail("--eval grades held-out problems, --prompt asks one: choose")
    if args.num_samples < 1 or args.max_new_tokens is not None and args.max_new_tokens < 1:
        fail("--num_samples and --max_new_tokens must be at least 1")
    if min(args.num_problems, args.seed) < 0 or not 0 <= (args.temperature or 0) < math.inf:
        fail("--num_problems, --seed and --temperature must be at least 0")
    return args


def show(models, options, problems):
    """Print responses with the verifier's verdict; with several problems or samples a summary line."""
    _, task, tokenizer = models
    num_samples = options['repeat']
    live = len(problems) == num_samples == 1 # a single response is printed while it is being sampled
    stream = Stream(tokenizer, len(tokenizer.encode(tokenizer.prompt(task, problems[0]))))
    if live:
        show_problem(task, tokenizer, problems[0])
    batch = respond(*models, problems, watch=stream if live else None, **options)
    verdicts = batch.correct.view(-1, num_samples).sum(1).int().tolist()
    for i, problem in enumerate(problems):
        rows = range(i * num_samples, (i + 1) * num_samples)
        best = max(rows, key=lambda row: batch.reward[row].item())
        if not live:
            show_problem(task, tokenizer, problem)
        print(batch.texts[best].partition(END_THINK)[0][stream.printed:].replace('\n', INDENT), end='')
        text = extract_answer(batch.texts[best])
        print(f'\nanswer    {"none" if text is None else text}\nverdict   {verdict(task, batch, best)}', end='')
        print(f'; {verdicts[i]} of {num_samples} samples correct, the best is shown' if num_samples > 1 else '')
    if len(problems) > 1 or num_samples > 1:
        print('\n' + summary_line(verdicts, num_samples))


def show_problem(task, tokenizer, problem):
    print('\nproblem   ' + tokenizer.prompt(task, problem).removesuffix('<think>').replace('\n', INDENT))
    if remark := task.remark(problem):
        print(f'          ({remark})')
    print('thinking  ', end='')


def verdict(task, batch, row):
    """Say in words how a response was graded."""
    if batch.correct[row]:
        return 'correct'
    if batch.truncated[row]:
        return f'cut off after {batch.length[row]:.0f} tokens'
    if not batch.formatted[row]:
        return 'not in the format'
    explanation = task.explain(batch.problems[row], extract_answer(batch.texts[row]))
    return f'wrong: {explanation}' if explanation else 'wrong'


class Stream:
    """Prints the thinking of the first response token by token; generate calls it with all the tokens so far."""

    def __init__(self, tokenizer, prompt_length):
        self.tokenizer, self.prompt_length, self.printed = tokenizer, prompt_length, 0

    def __call__(self, tokens):
        text = self.tokenizer.decode(tokens[0, self.prompt_length:].tolist())
        # What may yet become the tag that ends it, or a whole letter, is held back.
        thinking = text.partition(END_THINK)[0] if END_THINK in text else text[:-len(END_THINK)]
        print(thinking[self.printed:].replace('\n', INDENT), end='', flush=True)
        self.printed = max(self.printed, len(thinking))


def summary_line(verdicts, n):
    """Return accuracy, and pass@k for the powers of two up to n, as a line."""
    line = f'{len(verdicts)} problem(s) x {n} response(s): accuracy {sum(verdicts) / len(verdicts) / n:.3f}'
    return line + ''.join(f', pass@{2 ** i} {pass_at_k(verdicts, n, 2 ** i):.3f}' for i in range(1, n.bit_length()))


def grade_held_out(models, options, path, count):
    """Grade held-out problems; the numbers also go to sample_eval.json beside the checkpoint."""
    task, n = models[1], options['repeat']
    rows = evaluate(*models, held_out_problems(task, count), **options)
    result = summarize(rows)
    verdicts = [int(sum(row['correct'] for row in rows[i:i + n])) for i in range(0, len(rows), n)]
    print(summary_line(verdicts, n))
    print(', '.join(f'{group} {accuracy:.3f}' for group, accuracy in result['by_difficulty'].items()))
    target = os.path.join(os.path.dirname(path), 'sample_eval.json')
    with open(target, 'w') as file:
        json.dump(dict(checkpoint=path, temperature=options['temperature'], num_problems=len(verdicts), num_samples=n,
                       **result), file, indent=2)
    print(f'wrote {target}')


def export(model, tokenizer, folder):
    """Write config.json and model.safetensors, and the files of a pretrained model's tokenizer; our own vocabularies
    have no place in that layout."""
    files = tokenizer.state if isinstance(tokenizer.state, dict) else {}
    if os.path.exists(folder):
        fail(f"{folder} is there already: choose a new folder for the export")
    with one_line(folder):
        save_pretrained(model, folder, tokenizer.ends)
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
            parts = [[row['seconds_' + part] for row in steps] for part in PARTS]
            seconds.stackplot([*map(number, steps)], parts, labels=PARTS, colors=COLORS, alpha=0.7)
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


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints, and one line for what goes wrong

def load(checkpoint, name, device='auto', task_name='', max_new_tokens=None):
    """Return the model, task and tokenizer of a checkpoint, ready to respond; `name` is what messages call it. The
    file of a task is taken from task_name only: a checkpoint must not choose what code runs."""
    stored = checkpoint['task']
    if stored.endswith('.py') and not task_name:
        fail(f"the task of {name} is a file, {stored}, and a checkpoint must not choose what runs: add --task={stored}")
    task = make_task(task_name or stored, checkpoint['settings'])
    tokenizer = make_tokenizer(checkpoint['tokenizer'], task, name)
    device = pick_device(device)
    config = ModelConfig(**checkpoint['config'])
    if not isinstance(tokenizer.state, dict): # of our own models the positions may grow
        config.max_seq_len = max(config.max_seq_len, task.longest_prompt + (max_new_tokens or 0))
    model = Transformer.without_memory(config).to(getattr(torch, pick_dtype(device))).requires_grad_(False)
    model.allocate(device)
    model.load_state_dict(checkpoint['model'])
    return model, task, tokenizer


def make_task(name, settings):
    """Return the task of that name, or of that file, with its parameters among the settings."""
    with one_line(f'--task={name}', ValueError, OSError):
        kind = find_task(name)
        return kind(**{k: settings[k] for k in inspect.signature(kind).parameters if k in settings})


def make_tokenizer(state, task, name):
    """Return the tokenizer of a checkpoint, by its state; the task must be one of the same vocabulary."""
    with one_line(name):
        tokenizer = (PretrainedTokenizer if isinstance(state, dict) else Tokenizer)(state)
    if isinstance(tokenizer, Tokenizer) and tokenizer.tokens != task.tokens:
        fail(f"the vocabulary of {name} ({len(tokenizer.tokens)} tokens) is not that of the task with these settings "
             f"({len(task.tokens or [])} tokens): use the --task and the number ranges it was trained with")
    return tokenizer


def load_checkpoint(path):
    """Read and verify a checkpoint of ours. One line and exit when it is missing, damaged or something else."""
    with one_line(f'{path} as a checkpoint of this program'):
        with zipfile.ZipFile(path) as archive: # torch.load does not look at the checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if not isinstance(checkpoint, dict) or checkpoint.get('format') != FORMAT:
            raise ValueError(f"it does not say {FORMAT!r}")
        return checkpoint


def newest_model(folder):
    """Return the final model of the newest run in a folder (or pattern of folders), else the newest checkpoint, or
    None."""
    for name in ('tinyzero_astarpo_final.pt', 'checkpoint_step_*.pt'):
        if found := glob.glob(os.path.join(folder, name)):
            return max(found, key=os.path.getmtime)


def pick_device(device):
    """Return the device of that name, where 'auto' is the best one here. One line and exit when it cannot be used."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    with one_line(f'--device={device}'):
        torch.empty(1, device=device)
    return device


def pick_dtype(device):
    """Return the precision that computes best on a device."""
    if not device.startswith('cuda'):
        return 'float32'
    return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16' # Colab's T4


@contextlib.contextmanager
def one_line(name, *kinds):
    """Turn what goes wrong in here into one line. Other people's files and packages raise anything, so all exceptions
    count where no kinds are given."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{name} needs a package that is not installed: pip install {error.name.partition('.')[0]}")
    except kinds or Exception as error:
        message = ' '.join(str(error).split()).partition('. ')[0][:300]
        fail(f"cannot use {name}: {message} ({type(error).__name__})")


def out_of_memory(error):
    """Say whether memory ran out; CUDA, MPS and the CPU each say it in their own words."""
    return re.search("out of memory|ALLOC_FAILED|can't allocate memory|not enough memory", str(error))


def fail(message):
    """End the program with one line and exit status 1; where there are several machines, one line on each."""
    sys.exit(f'error: {message}' if (os.environ.get('LOCAL_RANK') or '0') == '0' else 1)


if __name__ == '__main__':
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors='replace') # what a terminal cannot show
    try:
        main()
    except (EOFError, KeyboardInterrupt): # how people leave a prompt
        print()
    except BrokenPipeError: # whoever read this, like head, has read enough
        os._exit(0)
    except OSError as error:
        fail(f'{error.filename}: {error.strerror}')
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fail('out of memory: lower --num_samples, --num_problems or --max_new_tokens')
