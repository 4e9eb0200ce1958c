"""
See what a trained model does.

    python sample.py                                  # five held-out problems, then yours, line by line
    python sample.py --prompt="3 5 7 = 22" --num_samples=16
    python sample.py --eval                           # grade the held-out problems
    python sample.py --plot out/countdown out/other   # curves of several runs over each other

Takes the newest run under out/, one that came to its end before one that did not, else
countdown's model in assets/. With --task=multiplication it takes the run in out/multiplication,
else that task's model in assets/. --checkpoint=PATH names another: a file, the folder of a run,
or pretrained weights, which need a --task=. The settings of the task can be given too, such as
--max_factor=40.

Training stands on this file: `respond` samples responses and grades them, in training and
evaluation alike, and is the one place where rewards are decided. Everything takes its settings as
arguments.
"""
import argparse
import contextlib
import difflib
import functools
import glob
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
import traceback
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from model import ModelConfig, Transformer, generate, load_pretrained, read_config
from tasks import (
    END_THINK, EOS, THINK, WRONG, PretrainedTokenizer, Tokenizer, extract_answer, find_task, tokenizer_files)

HERE = os.path.dirname(os.path.abspath(__file__))
FORMAT = 'tinyzero-astarpo 1' # what a checkpoint of ours says of itself
WARMUP, STAGE1, TRAIN, EVAL = range(4) # streams of random numbers
UNTRAINED = dict(eval_temperature=1.0, max_new_tokens=512, num_examples=1, rollout_rows=256) # for pretrained weights
INDENT = '\n' + 10 * ' '
COLORS = ['#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9'] # Okabe and Ito: told apart by everyone


# --------------------------------------------------------------------------------------------------
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


def respond(model, task, tokenizer, problems, key, repeat=1, *, max_new_tokens, temperature, first=0,
            rollout_rows=1024, stop=None, progress=None):
    """
    Sample `repeat` responses to each problem, rollout_rows side by side, and grade them. Every
    reward is decided here, for stage 1, stage 2 and evaluation alike: it is what the task's `grade`
    says, or 0 for a response that was truncated, because it did not end within max_new_tokens.

    The noise of a response follows from the integers in key and from its index in the whole batch,
    where `first` is that of the first one here: so it does not matter how ranks and pieces share
    the batch. stop: see model.generate. progress, a function, is given a line that says how long
    many responses still take. Returns a Batch.
    """
    started, device = time.monotonic(), model.embed.weight.device
    problems = [problem for problem in problems for _ in range(repeat)]
    pieces = []
    for start in range(0, len(problems), rollout_rows):
        part = problems[start:start + rollout_rows]
        prompts = [tokenizer.encode(tokenizer.prompt(task, problem)) for problem in part]
        # The last 1 keeps the noise apart from the numbers that drew the problem of that index.
        rngs = [np.random.default_rng((*key, first + start + i, 1)) for i in range(len(part))]
        noise = torch.from_numpy(np.stack([rng.random(max_new_tokens, np.float32) for rng in rngs]))
        pieces.append(generate(model, prompts, max_new_tokens, temperature, tokenizer.ends, noise, stop))
        done, spent = start + len(part), time.monotonic() - started
        if progress and spent > 10 and done < len(problems): # many long responses take minutes
            left = spent / 60 * (len(problems) / done - 1)
            progress(f'{done:,} of {len(problems):,} responses, {left:.1f} min left')
    tokens = pad_sequence([row for piece, _ in pieces for row in piece], True, tokenizer.ends[0]) # (B, T)
    mask = pad_sequence([row for _, piece in pieces for row in piece], True)

    sampled, grades, texts = time.monotonic(), [], []
    for problem, row, marked in zip(problems, tokens.cpu().numpy(), mask.cpu().numpy()):
        response = row[marked]
        truncated = response[-1] not in tokenizer.ends
        text = tokenizer.decode(response.tolist()).removesuffix(EOS)
        grade = WRONG if truncated else task.grade(problem, text)
        grades.append((*grade, truncated, len(response)))
        texts.append(text)
    columns = torch.tensor(grades, dtype=torch.float32, device=device).T # GRADES
    seconds = dict(rollout=sampled - started, grading=time.monotonic() - sampled)
    return Batch(tokens, mask, *columns, problems, texts, seconds)


def evaluate(model, task, tokenizer, problems, key, repeat=1, **options):
    """Grade `repeat` responses to each problem, with the options of respond. Returns a dict for
    every response."""
    batch = respond(model, task, tokenizer, problems, key, repeat, **options)
    columns = [getattr(batch, name).tolist() for name in GRADES]
    return [dict(zip(GRADES, grades), difficulty=task.difficulty(problem), prompt=tokenizer.prompt(task, problem),
                 response=text)
            for problem, text, *grades in zip(batch.problems, batch.texts, *columns)]


def summarize(rows):
    """Summarize the rows of evaluate: accuracy with its Wilson 95% interval, by difficulty, and
    other means. Several responses to a problem count as one in the interval, because they are much
    alike."""
    def mean(name, rows):
        return sum(row[name] for row in rows) / len(rows)
    n, p, z = len({row['prompt'] for row in rows}), mean('correct', rows), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = [max(0.0, middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    groups = {group: [row for row in rows if row['difficulty'] == group]
              for group in sorted({row['difficulty'] for row in rows})}
    return dict(accuracy=p, interval_95=interval, count=len(rows),
                by_difficulty={group: mean('correct', members) for group, members in groups.items()},
                **{name: mean(name, rows) for name in GRADES if name != 'correct'})


def described(result):
    """Return what summarize has found as a line."""
    low, high = result['interval_95']
    groups = [f'{group} {share:.3f}' for group, share in result['by_difficulty'].items()]
    return (f"accuracy {result['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {result['count']}, {', '.join(groups)}, "
            f"formatted {result['formatted']:.3f}, truncated {result['truncated']:.3f}, {result['length']:.0f} tokens")


@functools.lru_cache(maxsize=1) # drawing 2,000 takes a second
def held_out_problems(task, count):
    """Return `count` different problems of the test split, or all there are: the same in every run,
    whatever its seed."""
    rng, found, since = np.random.default_rng((EVAL, 2025)), {}, 0
    while len(found) < count and since < 5000:
        problem = task.draw(rng, test=True)
        since = 0 if task.canonical(problem) not in found else since + 1
        found.setdefault(task.canonical(problem), problem)
    return list(found.values())


def pass_at_k(verdicts, n, k):
    """Estimate the share of problems that k responses solve, from how many of n did (arXiv
    2107.03374, unbiased)."""
    return sum(1 - math.comb(n - solved, k) / math.comb(n, k) for solved in verdicts) / len(verdicts)


# --------------------------------------------------------------------------------------------------
# The command line

def main():
    args, words = parse_arguments()
    if args.plot:
        with one_line('--plot'):
            plot_runs(args.plot, args.output)
        return print(f'wrote {args.output}')
    path = find_checkpoint(args.checkpoint, args.task)
    checkpoint = open_model(path)
    given = {name: getattr(args, name) for name in UNTRAINED if getattr(args, name) is not None}
    settings = checkpoint['settings'] = UNTRAINED | checkpoint['settings'] | given
    models = model, task, tokenizer = load(checkpoint, path, args.device, args.task, words)
    if args.num_examples and isinstance(tokenizer, Tokenizer):
        fail("--num_examples is for pretrained weights: other models are not asked in words")
    options = dict(key=(args.seed, EVAL, checkpoint['step']), repeat=args.num_samples,
                   temperature=settings['eval_temperature'], max_new_tokens=settings['max_new_tokens'],
                   rollout_rows=settings['rollout_rows'], progress=lambda line: print(f'sampling: {line}', flush=True))
    print(f"{path}: {args.task or checkpoint['task']}, {model.num_params():,} parameters, "
          f"step {checkpoint['step']}, temperature {settings['eval_temperature']}")
    with one_line('these arguments', ValueError): # no problem of this task, or too long for the model
        if args.prompt is not None:
            return show(models, options, [task.parse(args.prompt)])
        if args.problems is None:
            usual = task.defaults.get('num_eval_samples', 2000) if args.eval else 5
            problems = held_out_problems(task, args.num_problems or usual)
        else:
            problems = read_problems(args.problems, task, tokenizer)[:args.num_problems or None]
        if args.eval:
            return grade_problems(models, options, path, problems, args.problems or 'held out')
        show(models, options, problems)
    talks = all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout)) # neither is a file, a pipe or closed
    with contextlib.suppress(EOFError, KeyboardInterrupt): # how people leave a prompt
        while talks and (text := input('\na problem of yours (empty line to leave): ')):
            try:
                show(models, options, [task.parse(text)])
            except ValueError as error:
                print(error)


def parse_arguments():
    """Return the arguments, and the words that are left over, which the task may take."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add('--checkpoint', help='a checkpoint, the folder of a run, or pretrained weights (default: see above)')
    add('--task', default='', help="the task of a model that was not trained here, or the file of a trained one's")
    add('--prompt', help='one problem, such as "3 5 7 = 22" or "47 * 36"')
    add('--eval', action='store_true', help='grade held-out problems, or those of a file, add to sample_eval.jsonl')
    add('--problems', help='a file of problems, one a line as typed (or {"nums": [3, 5, 7], "target": 22})')
    add('--num_problems', type=int, default=0, help='how many problems (default: 5, --eval mostly 2000, of a file all)')
    add('--num_samples', type=int, default=1, help='responses to each problem')
    add('--temperature', type=float, dest='eval_temperature', help='0 is greedy (default: that of the run)')
    add('--max_new_tokens', type=int, help='longest response (default: that of the run)')
    add('--rollout_rows', type=int, help='responses sampled side by side (default: that of the run)')
    add('--num_examples', type=int, help="worked examples in a pretrained model's prompt (default: those of the run)")
    add('--seed', type=int, default=1337, help='of the sampling noise')
    add('--device', default='auto', help='auto | cpu | cuda | mps')
    add('--plot', nargs='+', metavar='OUT_DIR', help='draw the curves of these runs and exit')
    add('--output', default='curves.png', type=os.path.expanduser, help='the picture that --plot writes')
    args, words = parser.parse_known_args()
    others = words + [f'--{name}' for name in ('checkpoint', 'prompt', 'eval', 'problems') if getattr(args, name)]
    if args.plot and others:
        fail(f"--plot takes no {others[0]}")
    if args.prompt is not None and (args.eval or args.problems is not None):
        fail("--eval and --problems take many problems, --prompt asks one: choose")
    counts = (args.num_samples, args.max_new_tokens, args.rollout_rows)
    if min(count for count in counts if count is not None) < 1:
        fail("--num_samples, --max_new_tokens and --rollout_rows must be at least 1")
    least = min(args.num_problems, args.seed, args.num_examples or 0, args.eval_temperature or 0)
    if least < 0 or not math.isfinite(args.eval_temperature or 0):
        fail("--num_problems, --seed, --num_examples and --temperature must be at least 0")
    return args, words


def show(models, options, problems):
    """Print the best response to each problem, with the verifier's verdict and a summary."""
    _, task, tokenizer = models
    n = options['repeat']
    batch = respond(*models, problems, **options)
    verdicts = batch.correct.view(-1, n).sum(1).int().tolist()
    for i, problem in enumerate(problems):
        best = i * n + batch.reward[i * n:(i + 1) * n].argmax().item()
        thinking, answer = batch.texts[best].partition(END_THINK)[0], extract_answer(batch.texts[best])
        verdict = ('correct' if batch.correct[best] else
                   f'cut off after {batch.length[best]:.0f} tokens' if batch.truncated[best] else
                   'wrong' if batch.formatted[best] else 'not in the format')
        in_words = isinstance(tokenizer, PretrainedTokenizer)
        question = task.question(problem) if in_words else task.prompt(problem).removesuffix(THINK)
        print('\nproblem  ', question.replace('\n', INDENT))
        print('thinking ', thinking.replace('\n', INDENT))
        print('answer   ', answer)
        print('verdict  ', verdict + f'; {verdicts[i]} of {n} samples correct' * (n > 1))
    if len(problems) > 1 or n > 1:
        print('\n' + summary_line(verdicts, n))


def summary_line(verdicts, n):
    """Return accuracy, and pass@k for the powers of two up to n, as a line."""
    shares = [f', pass@{2 ** i} {pass_at_k(verdicts, n, 2 ** i):.3f}' for i in range(1, n.bit_length())]
    accuracy = pass_at_k(verdicts, n, 1)
    return f'{len(verdicts)} problem(s) x {n} response(s): accuracy {accuracy:.3f}' + ''.join(shares)


def read_problems(path, task, tokenizer):
    """Return the problems of a file, one in each line as the task's parse reads it. One line and
    exit when one cannot be read, or asked."""
    problems = []
    with one_line('--problems', OSError, UnicodeError), open(os.path.expanduser(path), encoding='utf-8-sig') as file:
        lines = file.read().splitlines()
    for i, line in enumerate(lines, start=1):
        with one_line(f'{path}, line {i}', ValueError):
            if line.strip():
                problems.append(task.parse(line))
                tokenizer.encode(tokenizer.prompt(task, problems[-1]))
    return problems or fail(f"{path} holds no problems")


def grade_problems(models, options, path, problems, source):
    """Grade responses to problems, which are from that source. The numbers are also added to
    sample_eval.jsonl, beside a checkpoint of ours, else in the current folder."""
    n = options['repeat']
    rows = evaluate(*models, problems, **options)
    result = summarize(rows)
    verdicts = np.reshape([row['correct'] for row in rows], (-1, n)).sum(1).astype(int).tolist()
    print(summary_line(verdicts, n))
    print(described(result))
    own = {name: getattr(models[1], name, None) for name in parameters(type(models[1]))}
    row = dict(checkpoint=path, task=dict(name=type(models[1]).__name__, **own), problems=source,
               num_problems=len(verdicts), num_samples=n, temperature=options['temperature'],
               max_new_tokens=options['max_new_tokens'], seed=options['key'][0], **result)
    target = os.path.join(os.path.dirname(path) if path.endswith('.pt') else '', 'sample_eval.jsonl')
    with open(target, 'a') as file:
        file.write(json.dumps(row) + '\n')
    print(f'added to {target}')


def read_log(path):
    """Return the rows of metrics.jsonl, without lines that are damaged: a crash may have cut
    one."""
    rows = []
    with open(path, errors='replace') as file:
        for line in file:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and 'phase' in row]


def plot_runs(folders, path):
    """Draw held-out accuracy with the training reward, response length and KL of several runs over
    each other, and the accuracy by difficulty of the first one."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 7), layout='constrained')
    accuracy, by_difficulty, length, kl = figure.subplots(2, 2).flat
    for i, folder in enumerate(folders):
        name, color = os.path.basename(os.path.normpath(folder)), COLORS[i % len(COLORS)]
        rows = read_log(os.path.join(folder, 'metrics.jsonl'))
        steps = [row for row in rows if 'kl' in row]
        evaluations = [row for row in rows if row['phase'] == 'evaluation']
        def curve(axis, rows, values, *style, **options):
            axis.plot([row['seconds'] / 60 for row in rows], values, *style, **options)
        curve(accuracy, steps, [row['reward'] for row in steps], color=color, alpha=0.35, lw=1)
        curve(accuracy, evaluations, [row['accuracy'] for row in evaluations], 'o-', color=color, label=name)
        curve(length, steps, [row['length'] for row in steps], color=color)
        curve(kl, steps, [row['kl'] for row in steps], color=color)
        if i == 0:
            for group, shade in zip(evaluations[-1]['by_difficulty'] if evaluations else [], itertools.cycle(COLORS)):
                shares = [row['by_difficulty'].get(group) for row in evaluations]
                curve(by_difficulty, evaluations, shares, 'o-', color=shade, label=group)
            by_difficulty.set_title(f'held-out accuracy by difficulty ({name})')
    accuracy.set(title='held-out accuracy (dots), training reward (thin)', ylim=(0, 1.02))
    by_difficulty.set(ylim=(0, 1.02))
    length.set(title='response length, tokens')
    kl.set(title='KL to the reference')
    for axis in figure.axes:
        axis.set(xlabel='minutes')
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(framealpha=0.6, edgecolor='none')
    figure.savefig(path, dpi=100)


# --------------------------------------------------------------------------------------------------
# Checkpoints, and one line for what goes wrong

def load(checkpoint, name, device='auto', task_name='', words=()):
    """Return the model, task and tokenizer of a checkpoint, ready to respond; `name` is what
    messages call it, words are arguments for the task's class."""
    stored = checkpoint['task']
    if not stored and not task_name:
        fail(f"{name} was not trained here, so it needs --task=, such as --task=countdown")
    task = make_task(trusted(name, stored, task_name, '--task'), checkpoint['settings'], words)
    tokenizer = make_tokenizer(checkpoint['tokenizer'], task, name, checkpoint['settings'].get('num_examples', 0))
    device = pick_device(device)
    with one_line(name):
        model = Transformer.without_memory(checkpoint['config']).to(getattr(torch, pick_dtype(device)))
        model.requires_grad_(False).allocate(device)
        for p, whole in weights_of(checkpoint, model):
            p.copy_(whole)
    return model, task, tokenizer


def trusted(name, stored, given, option):
    """Return the name of a task or algorithm, given on the command line or else stored in the
    checkpoint `name`, which must not choose what code runs: a file has to be given."""
    if stored.endswith('.py') and not given:
        fail(f"a checkpoint must not choose what code runs, and {name} names a file: add {option}={stored}, or choose "
             "another checkpoint")
    return given or stored


def weights_of(checkpoint, model):
    """Return pairs of each parameter and its whole value, pretrained or of a checkpoint of ours."""
    if 'folder' in checkpoint:
        return load_pretrained(model, checkpoint['folder'])
    return ((p, checkpoint['model'][name]) for name, p in model.named_parameters())


def parameters(kind):
    """Return the parameters of a task's class with their defaults."""
    return {name: p.default for name, p in inspect.signature(kind).parameters.items()}


def read_arguments(words, defaults):
    """Return the settings among words such as --name=value and --name value, as the types of their
    defaults, and the words that are left over. One line and exit for a value that does not fit."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = fail
    for name, default in defaults.items():
        kind = true_or_false if isinstance(default, bool) else type(default)
        parser.add_argument(f'--{name}', type=kind, default=argparse.SUPPRESS)
    given, left_over = parser.parse_known_args(words)
    return vars(given), left_over


def true_or_false(text):
    """Return the bool that a text names. Raises ValueError for any other text."""
    if text.lower() not in ('true', 'false'):
        raise ValueError
    return text.lower() == 'true'


def refuse(word, defaults, task_name):
    """End with one line about a word that names no setting: which one it may mean, and which ones
    the task takes."""
    if not word.startswith('-'):
        fail(f"{word!r} is no setting: write --name=value (--help lists all)")
    name = word.partition('=')[0]
    close = [f'; did you mean --{match}?' for match in difflib.get_close_matches(name.strip('-'), defaults, n=1)]
    own = ', '.join(f'--{setting}' for setting in parameters(task_class(task_name))) or 'none of its own'
    fail(f"unknown setting {name}{''.join(close)} (--task={task_name} takes {own})")


def task_class(name):
    """Return the class of a task, by its name or file. One line and exit when there is none."""
    with one_line(f'--task={name}'):
        kind = find_task(name)
    for parameter, default in parameters(kind).items():
        if default is inspect.Parameter.empty:
            fail(f"--task={name}: give the parameter {parameter} of its class a default")
    return kind


def make_task(name, settings, words=()):
    """Return the task of that name, or of that file, with its parameters among the settings, where
    these are that task's, or among words such as --max_number=99."""
    kind = task_class(name)
    given, left_over = read_arguments(words, parameters(kind))
    if left_over:
        refuse(left_over[0], parameters(kind), name)
    known = settings if same_task(settings.get('task', name), name) else {}
    with one_line(f'--task={name}'):
        made = kind(**{k: known[k] for k in parameters(kind) if k in known} | given)
        made.fold = settings.get('fold', 0) # pretrained weights that were not trained here name none
        return made


def same_task(a, b):
    """Say whether two names mean the same task; its file may have moved."""
    return os.path.basename(a) == os.path.basename(b)


def make_tokenizer(state, task, name, num_examples):
    """Return the tokenizer of a checkpoint, by its state; the task must be one of the same
    vocabulary. num_examples is for a pretrained one."""
    pretrained = isinstance(state, dict)
    with one_line(name):
        tokenizer = PretrainedTokenizer(state, num_examples) if pretrained else Tokenizer(state)
    if pretrained and not hasattr(task, 'question'):
        fail(f"{name} is asked in words, but the task {type(task).__name__} has no `question`")
    if not pretrained and tokenizer.tokens != task.tokens:
        fail(f"the vocabulary of {name} ({len(tokenizer.tokens)} tokens) is not that of the task with these settings "
             f"({len(task.tokens or [])} tokens): use the --task and the number ranges it was trained with, or another "
             "checkpoint")
    return tokenizer


def open_model(path):
    """Return the checkpoint that a path names, a file or the folder of a run; or what is needed of
    pretrained weights, in a folder or at Hugging Face: where they are, their config and
    tokenizer."""
    named = re.fullmatch(r'\w[\w.-]*/[\w.-]+', path) and not path.endswith('.pt') # as at Hugging Face
    folder = path
    if not os.path.isdir(path):
        if os.path.exists(path) or not named:
            return load_checkpoint(path)
        with one_line(f'{path} (no file or folder here, so looked up at Hugging Face)'):
            from huggingface_hub import snapshot_download
            folder = snapshot_download(path, allow_patterns=['*.json', '*.jinja', 'model*.safetensors'])
    with one_line(path):
        return dict(folder=folder, config=read_config(folder), tokenizer=tokenizer_files(folder), settings={}, task='',
                    step=0)


def load_checkpoint(path, needed=()):
    """Read and verify a checkpoint of ours, which must hold what is needed too. One line and exit
    when it is missing, damaged or something else."""
    with one_line(f'{path} as a checkpoint of this program'):
        with zipfile.ZipFile(path) as archive: # torch.load does not look at the checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if not isinstance(checkpoint, dict) or checkpoint.get('format') != FORMAT:
            raise ValueError(f"it does not say {FORMAT!r}")
        if missing := {'task', 'step', 'settings', 'config', 'tokenizer', 'model', *needed} - checkpoint.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if isinstance(checkpoint['tokenizer'], list): # a model of our own, of which older files bound the positions
            checkpoint['config'].pop('max_seq_len', None)
        return checkpoint | dict(config=ModelConfig(**checkpoint['config']), settings=dict(checkpoint['settings']))


def find_checkpoint(path, task_name=''):
    """Return the checkpoint that a path names, a file or the folder of a run; of no path that of the
    task's folder in out/, else the task's in assets/, or the newest run's."""
    if path == '':
        fail("--checkpoint= names nothing")
    # Where train.py puts runs of the task by default; of no task out/ itself, where none is.
    name = os.path.basename(task_name).removesuffix('.py')
    asset = f"{HERE}/assets/{name or 'countdown'}_trained.pt"
    path = path or newest_model(glob.escape(f'out/{name}'))
    if not path and not (name and os.path.exists(asset)): # other runs are of other tasks
        path = newest_model('out/*')
    path = os.path.expanduser(path or asset)
    return newest_model(glob.escape(path)) or path


def newest_model(folder):
    """Return the final model of the newest run in a folder (or pattern of folders), else the last
    checkpoint of the newest, or None."""
    finals = glob.glob(os.path.join(folder, 'tinyzero_astarpo_final.pt'))
    last = [paths[-1] for paths in map(checkpoints, glob.glob(folder)) if paths]
    return max(finals or last, key=os.path.getmtime, default=None)


def checkpoints(folder):
    """Return the paths of the checkpoints in a run's folder that can be resumed, oldest first."""
    names = glob.glob('checkpoint_step_*.pt', root_dir=folder)
    steps = sorted(int(name[16:-3]) for name in names if name[16:-3].isdecimal())
    return [os.path.join(folder, f'checkpoint_step_{step}.pt') for step in steps]


def pick_device(device):
    """Return the device of that name, where 'auto' is the best one here, and of several GPUs that
    of this rank. One line and exit when it cannot be used."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if device == 'cuda':
        device = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
        ranks = int(os.environ.get('LOCAL_WORLD_SIZE') or 1)
        if ranks > max(1, torch.cuda.device_count()):
            fail(f"--nproc_per_node={ranks} needs as many GPUs, and this machine has {torch.cuda.device_count()}")
    with one_line(f'--device={device}'):
        torch.zeros(1, device=device).item()
    return device


def pick_dtype(device):
    """Return the precision that computes best on a device."""
    if not device.startswith('cuda'):
        return 'float32'
    return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16' # Colab's T4


@contextlib.contextmanager
def one_line(name, *kinds):
    """Turn what goes wrong in here into one line, which names the place where the code itself is
    wrong. Other people's files and packages raise anything, so all exceptions count where no kinds
    are given."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{name} needs a package that is not installed: pip install {error.name.partition('.')[0]}")
    except kinds or Exception as error:
        message = re.split('[.] (?=[A-Z])', ' '.join(str(error).split()))[0][:300] # its first sentence
        at = ''
        # The code is wrong, of a task for example.
        if isinstance(error, (AttributeError, ImportError, LookupError, NameError, TypeError)):
            place = traceback.extract_tb(error.__traceback__)[-1]
            at = f' in line {place.lineno} of {place.filename}'
        fail(f"cannot use {name}: {message} ({type(error).__name__}{at})")


def run_script(main, lower):
    """Call a script's main. What the machine did to it ends in one line, on every rank that it met,
    and exit status 1; `lower` names the settings to lower where memory runs out."""
    if sys.stdout: # nohup and cron may have closed it
        sys.stdout.reconfigure(errors='replace') # what a terminal cannot show
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError: # whoever read this, like head, has read enough
        os._exit(0)
    except OSError as error: # a folder that cannot be written, a full disk
        sys.exit(f'error: {error.filename or "a file"}: {error.strerror or error}')
    except (MemoryError, RuntimeError, ValueError) as error:
        message = ' '.join(repr(error).split())[:120]
        if 'max_seq_len' in message:
            sys.exit(f'error: {error} of these weights')
        if re.search("MemoryError|out of memory|ALLOC_FAILED|can't allocate memory|not enough memory", repr(error)):
            sys.exit(f'error: out of memory: lower {lower} ({message})')
        if 'inline_container' in str(error): # as torch.save says it
            sys.exit(f'error: a checkpoint could not be written, is the disk full? Earlier ones are whole ({message})')
        if re.search('closed by peer|reset by peer|Broken pipe|remote process exited|failed to recv', str(error)):
            sys.exit('error: another rank died; continue with --init_from=resume where a checkpoint was saved '
                     f'({message})')
        raise


def fail(message):
    """End the program with one line and exit status 1. Every rank comes here, and on each machine
    the first one speaks."""
    sys.exit(f'error: {message}' if (os.environ.get('LOCAL_RANK') or '0') == '0' else 1)


if __name__ == '__main__':
    run_script(main, '--rollout_rows')
