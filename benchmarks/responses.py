"""
What the countdown models write, before and after A*PO: how responses end, how often they try, what
they repeat.

    python benchmarks/responses.py                # both models in assets/ on 500 held-out puzzles, half a minute
    python benchmarks/responses.py --read=100     # and the responses with reward 1 of the trained one, to be read
    python benchmarks/responses.py --checkpoint out/searches --task=examples/searches.py
    python benchmarks/responses.py --min_numbers=5 --max_numbers=5       # it takes the settings of the task

An attempt is a line of the search. The flawless search of the same puzzle (Countdown.search) says
which lines are true and how often each may stand there: what is not among them is a mistake, what
stands there once more is repeated. For a model of examples/searches.py a second table says which
search it chooses, by the target, and how many of those responses are right.
"""
import argparse
import collections
import os
import sys

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
from examples.searches import ORDERS
from sample import EVAL, fail, find_checkpoint, held_out_problems, load, load_checkpoint, respond
from tasks import END_THINK, exact_value

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--checkpoint', nargs='+', metavar='PATH', help='files, or folders of runs',
                    default=[f'{top}/assets/countdown_base.pt', f'{top}/assets/countdown_trained.pt'])
parser.add_argument('--task', default='', help='the file of the task, where it is one')
parser.add_argument('--num_problems', type=int, default=500)
parser.add_argument('--max_new_tokens', type=int, help='default: that of the run')
parser.add_argument('--read', type=int, default=0, help='print so many right responses of the last model')
args, words = parser.parse_known_args()


def attempts(lines):
    """Yield the search lines among these, each with its join, without the steps of a solution."""
    join = ''
    for line in lines:
        if ':' in line:
            yield join, ':'.join(line.split(':')[:2])
        else:
            join = line


def is_true(step):
    """Say whether a step such as '14-2=12' is right."""
    try:
        return exact_value(step.partition('=')[0])[0] == int(step.partition('=')[2])
    except ValueError: # what is no sum at all
        return False


print('| model | right | gives up | cut off | wrong after a solution | other | attempts | repeated | with a mistake '
      '| right without steps | with a false step |\n' + '|---' * 11 + '|')
choices = []
for name in args.checkpoint:
    path = find_checkpoint(name)
    checkpoint = load_checkpoint(path)
    settings = checkpoint['settings']
    model, task, tokenizer = load(checkpoint, path, task_name=args.task, words=words)
    if not hasattr(task, 'search'):
        fail(f"{name} is a model of {type(task).__name__}, which has no search")
    batch = respond(model, task, tokenizer, held_out_problems(task, args.num_problems), (settings['seed'], EVAL),
                    max_new_tokens=args.max_new_tokens or settings['max_new_tokens'],
                    temperature=settings['eval_temperature'])
    count, right, begun = collections.Counter(), [], []
    for problem, text, correct, truncated in zip(batch.problems, batch.texts, batch.correct, batch.truncated):
        thinking, _, answer = text.partition(END_THINK)
        lines = thinking.split('\n')
        steps = lines[-1].split(':')[2].split() if lines[-1].count(':') == 2 else []
        count['right' if correct else 'cut off' if truncated else 'wrong after a solution' if steps else
              'gives up' if '+'.join(map(str, problem.numbers)) in answer else 'other'] += 1
        if correct:
            right.append(f"{tokenizer.prompt(task, problem)}{text}")
            count['no steps'] += not steps
            count['false step'] += not all(map(is_true, steps))
        if lines[0] in ORDERS: # a search of examples/searches.py
            begun.append((min(2, (problem.target - 1) // 33), lines[0], bool(correct)))
        true = collections.Counter(attempts(line for line, _ in task.search(problem)))
        written = collections.Counter(attempts(lines[:-1] if steps or truncated else lines)) # the last one is cut short
        count['attempts'] += written.total() + bool(steps)
        count['repeated'] += sum(max(0, n - max(1, true[line])) for line, n in written.items())
        count['mistake'] += sum(n for line, n in written.items() if not true[line])
    shares = [f'{count[key] / len(batch.texts):.1%}' for key in
              ('right', 'gives up', 'cut off', 'wrong after a solution', 'other')]
    print(f"| {os.path.basename(name)} | {' | '.join(shares)} | {count['attempts'] / len(batch.texts):.1f} a response "
          f"| {count['repeated'] / count['attempts']:.1%} | {count['mistake'] / count['attempts']:.1%} "
          f"| {count['no steps']} of {len(right)} | {count['false step']} of {len(right)} |", flush=True)
    for third, bounds in enumerate(('1 to 33', '34 to 66', '67 to 100')):
        cells, part = [], [(first, verdict) for at, first, verdict in begun if at == third]
        for first in ORDERS:
            verdicts = [verdict for other, verdict in part if other == first]
            cells.append(f'{len(verdicts) / max(1, len(part)):.0%}, {sum(verdicts) / max(1, len(verdicts)):.0%}')
        choices += [f"| {os.path.basename(name)} | {bounds} | {' | '.join(cells)} |"] * bool(part)
if choices:
    print(f"\n| model | target | {' | '.join(f'`{first}` first, right' for first in ORDERS)} |\n" + '|---' * 6 + '|')
    print(*choices, sep='\n')
print('\n\n'.join(['', *right[:args.read]]))
