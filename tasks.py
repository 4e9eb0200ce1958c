"""
The tasks: problems, prompts, demonstrations for the warm-up, the verifiers that decide what is
right, and the split.

A task is one class: its parameters are the keyword arguments of its constructor, its `defaults`
the settings of train.py that suit it. Countdown and Multiplication are the main ones, Chain is
the smallest, and examples/ has more, a file each, sorting.py with a comment at each part. This
file knows strings only: no tensors, no model.

The verifier is the ground truth of everything in this repo. It never executes what the model
wrote: it has a tokenizer and a parser of its own, exact rational arithmetic, and refuses answers
of more than 256 characters unread.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import re
import runpy
import sys
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

EOS, THINK, END_THINK, ANSWER, END_ANSWER = '<eos>', '<think>', '</think>', '<answer>', '</answer>'
TAGS = [EOS, THINK, END_THINK, ANSWER, END_ANSWER] # end-of-sequence has id 0 and also pads
MAX_ANSWER = 256 # characters
WHITE = r'[ \t\r\n]*'


class Tokenizer:
    """
    A fixed vocabulary: TAGS, then the task's own tokens. Where these hold whole integers ('10'
    among them), a number is one token and a single space between two numbers (or dots) is implied
    by their being neighbours; else numbers are spelt in digits.
    """

    def __init__(self, tokens):
        self.state = self.tokens = list(tokens) # `state` is plain data that travels in a checkpoint
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if not {*TAGS} <= self.ids.keys():
            raise ValueError("a vocabulary must hold TAGS, as in `tokens = TAGS + list('0123456789')`")
        self.ends = [self.ids[EOS]] # the tokens that end a response; the first one ends demonstrations
        self.whole_numbers = '10' in self.ids
        words = sorted((re.escape(t) for t in self.tokens if not t.isdigit()), key=len, reverse=True)
        words += ['[0-9]+' if self.whole_numbers else '[0-9]', '.'] # a letter that no token has, to name it
        implied = '(?:(?<=[0-9.]) (?=[0-9.]))?' if self.whole_numbers else ''
        self.pattern = re.compile(f"{implied}({'|'.join(words)})", re.DOTALL)

    def encode(self, text):
        """str -> list of ids. Raises ValueError, naming the piece, when the vocabulary does not
        have it."""
        pieces = self.pattern.findall(text)
        for piece in pieces:
            if piece not in self.ids:
                raise ValueError(f"{piece!r} is not in the vocabulary of this model ({len(self.tokens)} tokens)")
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids):
        """list of ids -> str, the inverse of encode on all prompts and demonstrations."""
        text = '\0'.join(self.tokens[i] for i in ids)
        if self.whole_numbers:
            text = re.sub('(?<=[0-9.])\0(?=[0-9.])', ' ', text)
        return text.replace('\0', '')

    def prompt(self, task, problem):
        """Return what the model is asked: the task's own short prompt."""
        return task.prompt(problem)

    def demonstration(self, task, problem, rng):
        """Return what the warm-up imitates."""
        return task.demonstration(problem, rng)


# How a pretrained model is asked: what comes first, and each turn up to where the response begins.
# One whose turns end with <|im_end|> knows ChatML, as Qwen's chats; others continue a transcript.
SYSTEM = 'You first think about a question inside <think> </think>, and then give the answer inside <answer> </answer>.'
FORMS = dict(
    base=(SYSTEM + '\n', 'Question: {}\nResponse: <think>'),
    chat=(f'<|im_start|>system\n{SYSTEM}<|im_end|>\n',
          '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>'))


TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'config.json',
                   'special_tokens_map.json', 'chat_template.jinja')


class PretrainedTokenizer:
    """
    A pretrained model's tokenizer, through the tokenizers library, with the interface of Tokenizer.
    Its state is the model's own files as text, {name: text}; a stranger's checkpoint may name
    others. Its prompts begin with num_examples worked examples. Padding is end-of-sequence here,
    whatever the files say: masks tell them apart. Raises ValueError when they name no
    end-of-sequence that the tokenizer has.
    """

    def __init__(self, files, num_examples=0):
        from tokenizers import Tokenizer as Library
        self.num_examples = num_examples
        self.state = {name: files[name] for name in TOKENIZER_FILES if name in files}
        self.library = Library.from_str(files['tokenizer.json'])
        self.library.no_truncation() # the file keeps what its last use had set
        self.library.no_padding()
        self.ends = self.find_ends()
        # Some tokenizers begin every text with special tokens, which go in front of the prompt;
        # some also end it.
        text = self.library.encode('x')
        begin = [i for i, _ in itertools.takewhile(lambda pair: pair[1], zip(text.ids, text.special_tokens_mask))]
        self.end = self.library.id_to_token(self.ends[0])
        start, self.turn = FORMS['chat' if self.end == '<|im_end|>' else 'base']
        self.start = self.library.decode(begin, skip_special_tokens=False) + start

    def find_ends(self):
        """Return the ids of all tokens that the files call an end: instruct models list several,
        and their files differ. The tokenizer's own, which ends a turn, comes first."""
        ends = []
        for name in ('tokenizer_config.json', 'generation_config.json', 'config.json'):
            content = json.loads(self.state.get(name, '{}'))
            if token := content.get('eos_token'): # a text, or that with its options
                ends.append(self.library.token_to_id(token['content'] if isinstance(token, dict) else token))
            listed = content.get('eos_token_id', [])
            ends += listed if isinstance(listed, list) else [listed]
        known = self.library.get_vocab(with_added_tokens=True).values()
        ends = [end for end in dict.fromkeys(ends) if end in known]
        if not ends:
            raise ValueError("no end-of-sequence in tokenizer_config.json, generation_config.json or config.json")
        return ends

    def encode(self, text):
        """str -> list of ids, without the special tokens that some tokenizers put around every
        text."""
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """list of ids -> str, where only an end-of-sequence reads EOS, so that grading knows it by
        that."""
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        text = self.library.decode(ids[:end], skip_special_tokens=False)
        return text.replace(EOS, EOS.upper()) + EOS * (end < len(ids))

    def prompt(self, task, problem):
        """Return what the model is asked: the task's question in words, in a chat or a transcript,
        behind examples of other problems."""
        examples = task.examples(self.num_examples + 1) if self.num_examples else []
        asked = task.canonical(problem)
        turns = [self.turn.format(task.question(other)) + response + self.end + '\n'
                 for other, response in examples if task.canonical(other) != asked]
        return ''.join([self.start, *turns[:self.num_examples], self.turn.format(task.question(problem))])

    def demonstration(self, task, problem, rng):
        """Return what the warm-up imitates: the usual way to write, which the model knows."""
        return task.worked_example(problem, rng)


def tokenizer_files(folder):
    """Return the state of a PretrainedTokenizer from a model's folder. Raises FileNotFoundError
    without a tokenizer.json."""
    paths = [Path(folder, name) for name in TOKENIZER_FILES]
    return {path.name: path.read_text(encoding='utf-8') for path in paths if path.exists() or path == paths[0]}


class Grade(NamedTuple):
    reward: float # 1.0 when correct, else the task's partial credit, always below 1
    correct: bool # the tags are right and the answer solves the problem
    formatted: bool # the tags are right and the answer parses


WRONG = Grade(0.0, False, False)


def extract_answer(response):
    """
    Return the text between <answer> and </answer>, or None when the response is not `thinking
    </think> <answer> ... </answer>` with white space between and exactly one answer behind the one
    </think>.
    """
    tail = response.split(EOS)[0].partition(END_THINK)[2]
    match = re.fullmatch(rf'{WHITE}{ANSWER}([^<]*){END_ANSWER}{WHITE}', tail)
    return match[1] if match and len(match[1]) <= MAX_ANSWER else None


class Task:
    """
    What the tasks share: the split, and the verifier of those whose answer is a whole number,
    `solution(problem)`.

    A task of your own has tokens, problem, prompt, parse, demonstration and grade (or solution), as
    Chain has; the rest is here. Only pretrained weights need `question`.
    """
    defaults = {} # the settings of train.py that suit this task
    tokens = None # the vocabulary of a model from random weights; a task without one needs pretrained weights
    fold = 0 # which tenth of the problems is held out, 0 to 9

    def canonical(self, problem):
        """Return a text that is equal for the same puzzle written differently; a problem that is a
        text is that. Raises ValueError for another."""
        if not isinstance(problem, str):
            raise ValueError(f"{problem!r} is no text, so {type(self).__name__} needs a method `canonical`")
        return problem

    def difficulty(self, problem):
        """Return the group of problems that accuracy is reported by."""
        return 'all'

    def parse(self, text):
        """Return the problem that a person typed. Raises ValueError for what is none."""
        raise ValueError(f"{type(self).__name__} has no `parse`, so its problems cannot be typed")

    def is_test(self, problem):
        """Say whether a problem is held out: about a tenth of all puzzles, by a stable hash, never
        trained on."""
        return hashlib.blake2b(self.canonical(problem).encode(), digest_size=8).digest()[0] % 10 == self.fold

    def draw(self, rng, test=False):
        """Draw a problem from the training split, or from the test split. Raises ValueError when
        there seems to be none."""
        for _ in range(10000):
            if self.is_test(problem := self.problem(rng)) == test:
                return problem
        raise ValueError("these number ranges allow too few problems for a split into training and test")

    def training_problems(self, key, indices):
        """Return a training problem with its generator for each index: a function of the key (seed,
        stream, step) and the index alone."""
        rngs = [np.random.default_rng((*key, i)) for i in indices]
        return [(self.draw(rng), rng) for rng in rngs]

    def worked_example(self, problem, rng):
        """Write a response the usual way, for pretrained models: their prompts and their
        warm-up."""
        return self.demonstration(problem, rng)

    @functools.lru_cache(maxsize=1)
    def examples(self, count):
        """Return up to `count` different training problems, each with a right response the usual
        way."""
        if not hasattr(self, 'demonstration'):
            return []
        rng, found = np.random.default_rng(2025), {}
        for _ in range(100):
            problem = self.draw(rng)
            response = self.worked_example(problem, rng)
            if self.grade(problem, response).correct:
                found.setdefault(self.canonical(problem), (problem, response))
            if len(found) == count:
                break
        return list(found.values())

    def grade(self, problem, response):
        """Grade an answer that must be solution(problem), in plain ASCII digits; other tasks have
        their own grade.

        Returns a Grade. A reward lies between 0 and 1 and is 1 only when the answer is correct.
        Whatever is returned here, sample.respond gives a response that was cut off the reward 0."""
        match = re.fullmatch(rf'{WHITE}(0|[1-9][0-9]*){WHITE}', extract_answer(response) or '')
        correct = match is not None and int(match[1]) == self.solution(problem)
        return Grade(float(correct), correct, match is not None)


def match_typed(pattern, text, example):
    """Match a problem that a person typed. Raises ValueError with an example of one."""
    if match := re.fullmatch(pattern, text.strip()):
        return match
    raise ValueError(f"{text.strip()[:80]!r} cannot be read as a problem of this task; write it like {example!r}")


# --------------------------------------------------------------------------------------------------
# Countdown

class CountdownProblem(NamedTuple):
    numbers: tuple
    target: int


def reachable(numbers):
    """Return every value that whole-number arithmetic makes from all of the numbers (a sorted
    tuple)."""
    # What five or more numbers reach is large and rarely asked for twice, so it is not kept.
    return (reachable_by_few if len(numbers) < 5 else reachable_by_few.__wrapped__)(numbers)


@functools.lru_cache(maxsize=2 ** 14)
def reachable_by_few(numbers):
    if len(numbers) == 1:
        return frozenset(numbers)
    values = set()
    # Split the numbers in two in every way; the first number is always on the left, so no split is
    # seen twice.
    for chosen in range(2 ** (len(numbers) - 1) - 1):
        left = numbers[:1] + tuple(n for i, n in enumerate(numbers[1:]) if chosen >> i & 1)
        right = tuple(n for i, n in enumerate(numbers[1:]) if not chosen >> i & 1)
        for x, y in itertools.product(reachable(left), reachable(right)):
            values.update(result for _, _, _, result in operations(x, y))
    return frozenset(values)


def operations(x, y):
    """List the operations on two whole numbers whose result is whole, as (larger, operator,
    smaller, result)."""
    a, b = max(x, y), min(x, y)
    result = [(a, '+', b, a + b), (a, '-', b, a - b), (a, '*', b, a * b)]
    return result + [(a, '/', b, a // b)] if b and a % b == 0 else result


class Term(NamedTuple):
    value: int
    text: str # the expression that makes it of given numbers
    steps: tuple # the operations one by one, '14-2=12'


class Countdown(Task):
    """
    Reach the target from the numbers with + - * / and parentheses, using each number exactly once.

    The numbers are uniform; the target is uniform among those that they can reach. Drawing random
    expressions instead would favour targets with many solutions and make the puzzles easier.
    """

    def __init__(self,
                 min_numbers=3, # how many numbers at least
                 max_numbers=4, # how many at most, up to 6
                 max_number=20, # numbers are drawn from 1 to this
                 min_target=1, # targets are drawn from this
                 max_target=100, # to this, among those that can be reached
                 partial_credit=0.0, # the most that a near miss earns, below 1
                 ):
        if not 3 <= min_numbers <= max_numbers <= 6:
            raise ValueError(f"it takes 3 to 6 numbers, {min_numbers=} and {max_numbers=} do not fit")
        if max_number < 1 or not 0 <= partial_credit < 1:
            raise ValueError(f"{max_number=} must be at least 1, {partial_credit=} at least 0 and below 1")
        if not 1 <= min_target <= max_target:
            raise ValueError(f"targets cannot go from {min_target=} to {max_target=}")
        self.min_numbers, self.max_numbers = min_numbers, max_numbers
        self.max_number, self.min_target, self.max_target = max_number, min_target, max_target
        self.partial_credit = partial_credit
        # Demonstrations leave alone what would get larger than this, so that the model has fewer
        # sums to learn; 98% of the puzzles have a solution below it.
        self.largest = max(max_target * 3 // 2, max_number, 10)
        self.tokens = TAGS + list('=+-*/():.\n') + [str(n) for n in range(self.largest + 1)]

    def problem(self, rng):
        for _ in range(10000):
            count = rng.integers(self.min_numbers, self.max_numbers + 1)
            numbers = tuple(map(int, rng.integers(1, self.max_number + 1, count)))
            targets = sorted(v for v in reachable(tuple(sorted(numbers))) if self.min_target <= v <= self.max_target)
            if targets:
                return CountdownProblem(numbers, targets[rng.integers(len(targets))])
        raise ValueError(f"numbers to {self.max_number} seem to reach no target from {self.min_target} on")

    def prompt(self, problem):
        return f"{' '.join(map(str, problem.numbers))}={problem.target}{THINK}"

    def question(self, problem):
        *first, last = map(str, problem.numbers)
        return (f"Which expression makes {problem.target} from the numbers {', '.join(first)} and {last}, using each "
                'exactly once, with + - * / and parentheses?')

    def parse(self, text):
        """Read '3 5 7 = 22', or a row of a data set, '{"nums": [3, 5, 7], "target": 22}'. Raises
        ValueError."""
        row = [re.search(field, text) for field in (r'"nums": *\[([0-9, ]+)\]', r'"target": *([0-9]+) *[,}]')]
        if all(row) and text.count('"nums"') == 1: # a list of rows on one line is no problem
            text = f'{row[0][1]} = {row[1][1]}'
        match = match_typed('([0-9]+(?:[ ,]+[0-9]+){1,5}) *= *([0-9]+)', text, '3 5 7 = 22') # two to six numbers
        return CountdownProblem(tuple(map(int, re.findall(r'[0-9]+', match[1]))), int(match[2]))

    def canonical(self, problem):
        return f"{' '.join(map(str, sorted(problem.numbers)))}={problem.target}"

    def difficulty(self, problem):
        return f'{len(problem.numbers)} numbers'

    def demonstration(self, problem, rng):
        """
        Write a search; two in three are given up within four lines. When a line solves the puzzle,
        `:14-2=12 12*7=84 84+13=97` says how, and the answer is that expression; else it is just the
        sum of the numbers. That it pays to search longer is left for A*PO to find out.
        """
        patience = rng.integers(1, 5) if rng.random() < 2 / 3 else math.inf
        return self.response(problem, self.search(problem), patience)

    def response(self, problem, search, patience=math.inf):
        """Write a search up to its solution, or until it has had so many lines, and the answer."""
        lines, answer = [], '+'.join(map(str, problem.numbers))
        for line, solution in search:
            lines.append(line)
            patience -= ':' in line
            if solution:
                lines[-1] += ':' + ' '.join(solution.steps)
                answer = solution.text[1:-1]
            if solution or not patience:
                break
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{answer}{END_ANSWER}'

    def worked_example(self, problem, rng):
        """Write up to two random tries and a solution, where the search finds one, a line each: `14
        - 2 = 12, 12 * 7 = 84, 84 + 13 = 97`. The last one is the answer."""
        tries = []
        while len(tries) < 2 and problem.target not in [term.value for term in tries]:
            pool = [Term(n, str(n), ()) for n in problem.numbers]
            while len(pool) > 1:
                x, y = (pool.pop(rng.integers(len(pool))) for _ in range(2))
                terms = self.joins(x, y)
                pool.append(terms[rng.integers(len(terms))])
            tries += pool
        if tries[-1].value != problem.target:
            solutions = (solution for _, solution in self.search(problem) if solution)
            tries += itertools.islice(solutions, 1) # the search leaves out what gets large
        lines = [', '.join(re.sub('([-+*/=])', r' \1 ', step) for step in term.steps) for term in tries]
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{tries[-1].text[1:-1]}{END_ANSWER}'

    def search(self, problem, pool=None, joined=(), order=None):
        """
        Search from both ends, line by line, each with the solution that it found or None. `z ...:x
        y ...` sets one of three numbers, z, aside and lists what + - * / make of the target and z,
        which is what the other two would have to make, and what these do make. A number in both
        lists solves the puzzle; README walks through one. Of more than three numbers some are
        joined first: `6)12/4=3 9 8` joins the sixth pair. Pair after pair has its turn; or `order`, a
        function of the joined Term, sorts the joins. No solver guides the search. `pool` is what is
        left of the numbers and `joined` the lines that say how, in a search within the search.
        """
        pool = pool or [Term(n, str(n), ()) for n in problem.numbers]
        if len(pool) > 3:
            joins = [(i, x, y, term) for i, (x, y) in enumerate(itertools.combinations(pool, 2), start=1)
                     for term in self.joins(x, y)]
            if order:
                joins.sort(key=lambda join: order(join[3])) # keeps the order of equals
            for i, x, y, term in joins:
                rest = [other for other in pool if other is not x and other is not y]
                line = f"{i}){term.steps[-1]} {' '.join(str(other.value) for other in rest)}"
                yield from self.search(problem, [term, *rest], [*joined, line], order)
            return
        for line in joined:
            yield line, None
        for z in pool:
            x, y = [term for term in pool if term is not z]
            wanted, made = self.results(problem.target, z.value), self.results(x.value, y.value)
            hit = next((result for result in made if result in wanted and result != '.'), None)
            if hit:
                made = made[:made.index(hit) + 1]
            line = f"{z.value} {' '.join(wanted)}:{x.value} {y.value} {' '.join(made)}"
            yield line, hit and next(end for middle in self.joins(x, y) if str(middle.value) == hit
                                     for end in self.joins(z, middle) if end.value == problem.target)

    def joins(self, x, y):
        """Return the terms that + - * / make of two, each value once, none too large; the steps of
        x come first."""
        made, steps = {}, x.steps + y.steps
        x, y = sorted((x, y), key=lambda term: term.value, reverse=True)
        for a, operator, b, result in operations(x.value, y.value):
            if result <= self.largest:
                made.setdefault(result, Term(result, f'({x.text}{operator}{y.text})',
                                             (*steps, f'{a}{operator}{b}={result}')))
        return list(made.values())

    def results(self, x, y):
        """Return what + - * / make of two numbers, as strings in this order; '.' where that is not
        whole, too large or a product with 0 (which no division undoes), dropped at the end."""
        made = {operator: str(result) for _, operator, _, result in operations(x, y)
                if result <= self.largest and (operator != '*' or result)}
        return ' '.join(made.get(operator, '.') for operator in '+-*/').rstrip(' .').split()

    def grade(self, problem, response):
        try:
            value, used = exact_value(extract_answer(response) or '')
        except ValueError:
            return WRONG
        if value is None or sorted(used) != sorted(problem.numbers):
            return Grade(0.0, False, True)
        if value == problem.target:
            return Grade(1.0, True, True)
        closeness = 1 / (1 + abs(value - problem.target)) # in (0, 1)
        return Grade(self.partial_credit * float(closeness), False, True)


def exact_value(text):
    """
    Return the value of an arithmetic expression as an exact Fraction (None when it divides by
    zero), and the integers it uses.

    Integers are ASCII digits without leading zero; + - * / and parentheses, no signs, dots or
    underscores; white space only between tokens. Raises ValueError on anything else. Operators wait
    on a stack until what follows binds less tightly: no recursion, so no depth of parentheses can
    exhaust Python's.
    """
    binds = {'(': 0, ')': 1, '+': 2, '-': 2, '*': 3, '/': 3}
    values, operators, used, expects_number = [], [], [], True
    for token in ['(', *re.findall(r'[0-9]+|[^ \t\r\n]', text), ')']:
        if expects_number and token == '(':
            operators.append(token)
        elif expects_number and re.fullmatch('0|[1-9][0-9]*', token):
            used.append(int(token))
            values.append(Fraction(used[-1]))
            expects_number = False
        elif not expects_number and operators and token in '+-*/)': # nothing follows what closes the first '('
            while binds[operators[-1]] >= binds[token]:
                y, x = values.pop(), values.pop()
                values.append(apply(x, operators.pop(), y))
            if token == ')':
                operators.pop()
            else:
                operators.append(token)
            expects_number = token != ')'
        else:
            raise ValueError(f"{token!r} is not expected here")
    if operators:
        raise ValueError("a parenthesis is not closed")
    return values.pop(), used


def apply(x, operator, y):
    """Return x operator y, or None where a division by zero is in it."""
    if x is None or y is None or operator == '/' and y == 0:
        return None
    return x + y if operator == '+' else x - y if operator == '-' else x * y if operator == '*' else x / y


# --------------------------------------------------------------------------------------------------
# Multiplication

def places(n):
    """Return what each digit of a number is worth, units first: 407 -> [7, 0, 400]."""
    return [int(digit) * 10 ** place for place, digit in enumerate(reversed(str(n)))]


class MultiplicationProblem(NamedTuple):
    a: int
    b: int


class Multiplication(Task):
    """What is a × b? Numbers are spelt in digits, so that the model has to carry."""
    defaults = dict(warmup_steps=4000, warmup_batch_size=32, max_steps=48, max_new_tokens=96)

    def __init__(self,
                 max_factor=99, # factors are drawn from 1 to this
                 ):
        if max_factor < 1:
            raise ValueError(f"{max_factor=} must be at least 1")
        self.max_factor = max_factor
        self.tokens = TAGS + ['What is ', ' × ', '?', '=', '+', '*', '\n'] + [str(n) for n in range(10)]

    def problem(self, rng):
        return MultiplicationProblem(*map(int, rng.integers(1, self.max_factor + 1, 2)))

    def prompt(self, problem):
        return self.question(problem) + THINK

    def question(self, problem):
        return f'What is {problem.a} × {problem.b}?'

    def parse(self, text):
        """Read '47 * 36', '47 x 36' or 'What is 47 × 36?'. Raises ValueError."""
        match = match_typed(r'(?:What is )?([0-9]+) *[*x×] *([0-9]+)\??', text, '47 * 36')
        return MultiplicationProblem(int(match[1]), int(match[2]))

    def canonical(self, problem):
        return f'{min(problem)}*{max(problem)}'

    def difficulty(self, problem):
        return '{}x{} digits'.format(*sorted(len(str(n)) for n in problem))

    def solution(self, problem):
        return problem.a * problem.b

    def worked_example(self, problem, rng):
        """Write the products with the digits of b and their sum: `23 × 36 = 23 × 30 + 23 × 6 = 690
        + 138 = 828`."""
        a, b = problem
        parts = [part for part in reversed(places(b)) if part]
        steps = [f'{a} × {b}']
        if len(parts) > 1:
            steps.append(' + '.join(f'{a} × {part}' for part in parts))
            steps.append(' + '.join(str(a * part) for part in parts))
        return ' = '.join([*steps, str(a * b)]) + f'{END_THINK}{ANSWER}{a * b}{END_ANSWER}'

    def demonstration(self, problem, rng):
        """
        Write one of mixed quality, as texts by people are: a third give the answer at once, a third
        write the product with each digit of b and add these up, a third break it down to the
        products of single digits. All are right; but the less is written, the harder it is to say.
        Which way of thinking pays is left for A*PO to find out.

        Numbers in the working stand with their units first, 74*03=0141, so that a carry is known
        before the digit that needs it (Lee et al., arXiv 2307.03381); written the usual way, nearly
        all of the last errors were carries.
        """
        back = lambda n: str(n)[::-1]
        detail = rng.integers(3)
        lines, total = [], 0
        for y in places(problem.b) if detail else []:
            for x in places(problem.a) if detail == 2 else [problem.a]:
                lines.append(f'{back(x)}*{back(y)}={back(x * y)}')
                if len(lines) > 1:
                    lines.append(f'{back(total)}+{back(x * y)}={back(total + x * y)}')
                total += x * y
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{self.solution(problem)}{END_ANSWER}'


# --------------------------------------------------------------------------------------------------
# A small one, to start your own from

class Chain(Task):
    """What is 7+12-5? A problem is that text, so the same terms in another order are another problem.
    Half of the demonstrations answer at once, half write each sum."""
    defaults = dict(warmup_steps=1000, warmup_batch_size=32, max_steps=60, max_new_tokens=64)

    def __init__(self,
                 max_number=20, # numbers are drawn from 1 to this
                 ):
        if max_number < 1:
            raise ValueError(f"{max_number=} must be at least 1")
        self.max_number = max_number
        self.tokens = TAGS + list('+-=\n') + [str(n) for n in range(6 * max_number + 1)] # numbers as a whole

    def problem(self, rng):
        text = str(rng.integers(1, self.max_number + 1))
        for _ in range(rng.integers(2, 6)):
            y, minus = rng.integers(1, self.max_number + 1), rng.integers(2)
            text += f"{'-' if minus and y <= self.solution(text) else '+'}{y}" # never below 0
        return text

    def solution(self, problem):
        return sum(map(int, re.findall('[+-]?[0-9]+', problem)))

    def prompt(self, problem):
        return problem + THINK

    def question(self, problem):
        return f'What is {problem}?'

    def parse(self, text):
        text = re.sub(' *([+-]) *', r'\1', text.strip())
        if len(text) > 80 or not re.fullmatch(r'[0-9]+([+-][0-9]+)+', text) or self.solution(text) < 0:
            raise ValueError(f"{text[:80]!r} is no chain of numbers with a value of 0 or above; write it like '7+12-5'")
        return text

    def difficulty(self, problem):
        return f"{len(re.findall('[0-9]+', problem))} numbers"

    def worked_example(self, problem, rng):
        terms = re.findall('[+-]?[0-9]+', problem)
        sums = [sum(map(int, terms[:i + 1])) for i in range(len(terms))]
        lines = [f'{x}{term}={total}' for x, term, total in zip(sums, terms[1:], sums[1:])]
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{sums[-1]}{END_ANSWER}'

    def demonstration(self, problem, rng):
        worked = self.worked_example(problem, rng)
        return worked if rng.integers(2) else END_THINK + worked.partition(END_THINK)[2]


TASKS = dict(countdown=Countdown, multiplication=Multiplication, chain=Chain)


def find_task(name):
    """Return the class of a task, by its name or from a Python file, which is run: only the command
    line may name one. Raises ValueError when there is no such task or file."""
    if name in TASKS:
        return TASKS[name]
    if not name.endswith('.py'):
        raise ValueError(f"there is no task {name!r}, only {', '.join(TASKS)} and files such as examples/grid.py")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {name}")
    module = run_file(path, 'task_file')
    found = [thing for thing in module.values() if getattr(thing, '__module__', '') == 'task_file' and
             isinstance(thing, type) and issubclass(thing, Task)]
    if len(found) != 1:
        raise ValueError(f"a task's file must define one subclass of Task, {name} defines {len(found)}")
    return found[0]


def run_file(path, name):
    """Run a Python file under a module's name. Returns the names that it defines."""
    sys.path.append(os.path.dirname(path)) # it may import what lies beside it
    return runpy.run_path(str(path), run_name=name)
