"""
The tasks: problems, prompts, demonstrations for the warm-up, and the verifiers that decide what is right.

A task has problem(rng), prompt(problem), parse(text), demonstration(problem, rng), grade(problem, response),
canonical(problem), is_test(problem) and difficulty(problem). This file knows strings only: no tensors, no model.

The verifier is the ground truth of everything in this repo. It never executes what the model wrote: it has a tokenizer
and a parser of its own, exact rational arithmetic, and refuses answers of more than 256 characters unread.
"""
import copy
import difflib
import functools
import hashlib
import itertools
import json
import math
import random
import re
import signal
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
    A fixed vocabulary: TAGS, then the task's own tokens. Where these hold whole integers ('10' among them), a number
    is one token and a single space between two numbers (or dots) is implied by their being neighbours; else numbers
    are spelt in digits.
    """
    form = '' # of the prompts: the task's own

    def __init__(self, tokens):
        self.state = self.tokens = list(tokens) # `state` is plain data that travels in a checkpoint
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.eos = self.ids[EOS]
        self.whole_numbers = '10' in self.ids
        words = sorted((re.escape(t) for t in self.tokens if not t.isdigit()), key=len, reverse=True)
        words += ['[0-9]+' if self.whole_numbers else '[0-9]', '.'] # a letter that no token has, to name it
        implied = '(?:(?<=[0-9.]) (?=[0-9.]))?' if self.whole_numbers else ''
        self.pattern = re.compile(f"{implied}({'|'.join(words)})", re.DOTALL)

    def encode(self, text):
        """str -> list of ids. Raises ValueError, naming the piece, when the vocabulary does not have it."""
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


# What a pretrained model is asked, with TinyZero's content: a transcript to go on with, or ChatML as in Qwen's chats.
FORMS = dict(
    base='The following is a conversation. A user asks a question, and an assistant first thinks about it and then '
         'gives the answer.\nUser: {}\nAssistant: Let me work it out step by step.\n<think>',
    chat='<|im_start|>system\nYou are a helpful assistant. You first think about a question and then give the answer.'
         '<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nLet me work it out step by step.\n<think>')
TAGGED = 'Think inside <think> </think>, then give {} inside <answer> </answer>, for example <answer> {} </answer>.'


class PretrainedTokenizer:
    """
    A pretrained model's tokenizer, through the tokenizers library, with the interface of Tokenizer. Its state is the
    model's own files as text, {name: text}. Padding is end-of-sequence here, whatever they say: masks tell them apart.
    Raises ValueError when they name no end-of-sequence.
    """

    def __init__(self, files):
        from tokenizers import Tokenizer as Library
        self.state, self.library = files, Library.from_str(files['tokenizer.json'])
        read = lambda name: json.loads(files.get(name, '{}'))
        # An instruct model may list several ends; what its tokenizer says is the one that ends its turns.
        end = read('tokenizer_config.json').get('eos_token')
        end = self.library.token_to_id(end['content'] if isinstance(end, dict) else end) if end else None
        ends = end, *(read(name).get('eos_token_id') for name in ('generation_config.json', 'config.json'))
        self.eos = next((end[0] if isinstance(end, list) else end for end in ends if end is not None), None)
        if self.eos is None:
            raise ValueError("no end-of-sequence in tokenizer_config.json, generation_config.json or config.json")
        # Some tokenizers begin every text with a token of their own, which goes in front of the prompt only.
        begin = self.library.decode(self.library.encode('').ids, skip_special_tokens=False)
        self.form = begin + FORMS['chat' if self.library.id_to_token(self.eos) == '<|im_end|>' else 'base']

    def encode(self, text):
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """list of ids -> str, where only the end-of-sequence reads EOS, so that grading knows it by that."""
        end = ids.index(self.eos) if self.eos in ids else len(ids)
        text = self.library.decode(ids[:end], skip_special_tokens=False)
        return text.replace(EOS, EOS.upper()) + EOS * (end < len(ids))


def tokenizer_files(folder):
    """The state of a PretrainedTokenizer from a model's folder. Raises FileNotFoundError without a tokenizer.json."""
    paths = [Path(folder, name) for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json',
                                             'config.json', 'special_tokens_map.json', 'chat_template.jinja')]
    return {path.name: path.read_text(encoding='utf-8') for path in paths if path.exists() or path == paths[0]}


class Grade(NamedTuple):
    reward: float # 1.0 when correct, else the task's partial credit, always below 1
    correct: bool # the tags are right and the answer solves the problem; nothing else
    formatted: bool # the tags are right and the answer parses


WRONG = Grade(0.0, False, False)


def extract_answer(response):
    """
    The text between <answer> and </answer>, or None when the response is not
    `thinking </think> <answer> ... </answer>` with white space between and exactly one answer behind the one </think>.
    """
    head, end_think, tail = response.split(EOS)[0].partition(END_THINK)
    match = re.fullmatch(rf'{WHITE}{ANSWER}([^<]*){END_ANSWER}{WHITE}', tail)
    return match[1] if match and len(match[1]) <= MAX_ANSWER else None


class Task:
    """What the tasks share: the split, and the verifier of those whose answer is a whole number, `solution`."""
    form = '' # where the question is asked in words, what stands around it
    longest_prompt = 256 # tokens

    def canonical(self, problem):
        """Equal for the same puzzle written differently; a problem that is a text is that already."""
        return problem

    def difficulty(self, problem):
        """The group of problems that accuracy is reported by."""
        return 'all'

    def remark(self, problem):
        """What sample.py says beside a problem: why it cannot be solved, or that it is outside the training."""
        return ''

    def explain(self, problem, answer):
        """What sample.py says of an answer that parses and is wrong."""
        return ''

    def is_test(self, problem):
        """About a tenth of all puzzles, chosen by a stable hash: never trained on, neither in warm-up nor later."""
        return hashlib.blake2b(self.canonical(problem).encode(), digest_size=8).digest()[0] % 10 == 0

    def draw(self, rng, test=False):
        """A problem from the training split, or from the test split. Raises ValueError when there seems to be none."""
        for _ in range(10000):
            if self.is_test(problem := self.problem(rng)) == test:
                return problem
        raise ValueError("these number ranges allow too few problems for a split into training and test")

    def grade(self, problem, response):
        """Of an answer that must be solution(problem), in plain ASCII digits; other tasks have a grade of their own."""
        match = re.fullmatch(rf'{WHITE}(0|[1-9][0-9]*){WHITE}', extract_answer(response) or '')
        correct = match is not None and int(match[1]) == self.solution(problem)
        return Grade(float(correct), correct, match is not None)

    def ask(self, short, question, answer, example):
        """The prompt: short in our own vocabularies; in words for a pretrained model, with an example of an answer."""
        return self.form.format(f'{question} {TAGGED.format(answer, example)}') if self.form else short + THINK


def typed(pattern, text, example):
    """The match of a problem that a person typed. Raises ValueError with an example of one."""
    if match := re.fullmatch(pattern, text.strip()):
        return match
    raise ValueError(f"{text.strip()[:80]!r} is no problem of this task; write it like {example!r}")


# --------------------------------------------------------------------------------------------------------------------
# Countdown

class CountdownProblem(NamedTuple):
    numbers: tuple
    target: int


def reachable(numbers):
    """Every value that whole-number arithmetic makes from all of the numbers (a sorted tuple), exact."""
    # What five numbers and more reach is much, and seldom asked for twice: it is not kept.
    return (reachable_by_few if len(numbers) < 5 else reachable_by_few.__wrapped__)(numbers)


@functools.lru_cache(maxsize=2 ** 14)
def reachable_by_few(numbers):
    if len(numbers) == 1:
        return frozenset(numbers)
    values = set()
    # Split the numbers in two in every way; the first number is always on the left, so no split is seen twice.
    for chosen in range(2 ** (len(numbers) - 1) - 1):
        left = numbers[:1] + tuple(n for i, n in enumerate(numbers[1:]) if chosen >> i & 1)
        right = tuple(n for i, n in enumerate(numbers[1:]) if not chosen >> i & 1)
        for x, y in itertools.product(reachable(left), reachable(right)):
            values.update(result for _, _, _, result in operations(x, y))
    return frozenset(values)


def operations(x, y):
    """The operations on two whole numbers whose result is a whole number, as (larger, operator, smaller, result)."""
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

    The numbers are uniform; the target is uniform among those that they can reach. Drawing random expressions instead
    would favour targets with many solutions and make the puzzles easier.
    """

    def __init__(self, min_numbers=3, max_numbers=4, max_number=20, max_target=100, partial_credit=0.0):
        self.min_numbers, self.max_numbers, self.max_number, self.max_target = (
            min_numbers, max_numbers, max_number, max_target)
        self.partial_credit = partial_credit # reward of a wrong answer that is almost there; 0: none
        # Demonstrations leave alone what would get larger than this, so that the model has fewer sums to learn; 98% of
        # the puzzles have a solution below it.
        self.largest = max(max_target * 3 // 2, max_number, 10)
        self.tokens = TAGS + list('=+-*/():.\n') + [str(n) for n in range(self.largest + 1)]

    def problem(self, rng):
        while True:
            count = rng.integers(self.min_numbers, self.max_numbers + 1)
            numbers = tuple(map(int, rng.integers(1, self.max_number + 1, count)))
            targets = sorted(v for v in reachable(tuple(sorted(numbers))) if 1 <= v <= self.max_target)
            if targets:
                return CountdownProblem(numbers, targets[rng.integers(len(targets))])

    def prompt(self, problem):
        return self.ask(f"{' '.join(map(str, problem.numbers))}={problem.target}",
                        f"Make {problem.target} from the numbers {', '.join(map(str, problem.numbers))}, using each "
                        "exactly once, with + - * / and parentheses.", 'the expression', '(1 + 2) / 3')

    def parse(self, text):
        """'3 5 7 = 22' -> problem. Raises ValueError."""
        match = typed('([0-9]+(?:[ ,]+[0-9]+){1,5}) *= *([0-9]+)', text, '3 5 7 = 22') # two to six numbers
        return CountdownProblem(tuple(map(int, re.findall(r'[0-9]+', match[1]))), int(match[2]))

    def canonical(self, problem):
        return f"{' '.join(map(str, sorted(problem.numbers)))}={problem.target}"

    def difficulty(self, problem):
        return f'{len(problem.numbers)} numbers'

    def remark(self, problem):
        numbers, target = problem
        if target not in reachable(tuple(sorted(numbers))):
            return 'cannot be solved by whole-number steps'
        if (self.min_numbers <= len(numbers) <= self.max_numbers and 1 <= target <= self.max_target
                and 1 <= min(numbers) and max(numbers) <= self.max_number):
            return ''
        return (f'outside its training: {self.min_numbers} to {self.max_numbers} numbers up to {self.max_number}, '
                f'targets up to {self.max_target}')

    def explain(self, problem, answer):
        value, used = evaluate(answer)
        if sorted(used) != sorted(problem.numbers):
            return 'it does not use each number once'
        return 'it divides by zero' if value is None else f'it makes {value}'

    def demonstration(self, problem, rng):
        """
        A search of which two in three are given up within four lines. When a line solves the puzzle,
        `:14-2=12 12*7=84 84+13=97` says how, and the answer is that expression; else it is just the sum of the numbers.
        That it pays to go on is for A*PO to find out.
        """
        lines, patience = [], rng.integers(1, 5) if rng.random() < 2 / 3 else math.inf
        answer = '+'.join(map(str, problem.numbers))
        for line, solution in self.search(problem):
            lines.append(line)
            patience -= ':' in line
            if solution:
                lines[-1] += ':' + ' '.join(solution.steps)
                answer = solution.text[1:-1]
            if solution or not patience:
                break
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{answer}{END_ANSWER}'

    def search(self, problem, pool=None, joined=()):
        """
        A search from both ends, line by line, each with the solution that it found or None. `z ...:x y ...` sets one of
        three numbers, z, aside and lists what + - * / make of the target and z, which is what the other two would have
        to make, and what these do make. A number in both lists solves the puzzle. Of more than three numbers some are
        joined first: `6)12/4=3 9 8` joins the sixth pair. Pair after pair has its turn, no solver guides the search.
        `pool` is what is left of the numbers and `joined` the lines that say how, in a search within the search.
        """
        pool = pool or [Term(n, str(n), ()) for n in problem.numbers]
        if len(pool) > 3:
            for i, (x, y) in enumerate(itertools.combinations(pool, 2), start=1):
                rest = [term for term in pool if term is not x and term is not y]
                for term in self.joins(x, y):
                    line = f"{i}){term.steps[-1]} {' '.join(str(other.value) for other in rest)}"
                    yield from self.search(problem, [term, *rest], [*joined, line])
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
        """The terms that + - * / make of two, each value once, none too large; the steps of x come first."""
        made, steps = {}, x.steps + y.steps
        x, y = sorted((x, y), key=lambda term: term.value, reverse=True)
        for a, operator, b, result in operations(x.value, y.value):
            if result <= self.largest:
                made.setdefault(result, Term(result, f'({x.text}{operator}{y.text})',
                                             (*steps, f'{a}{operator}{b}={result}')))
        return list(made.values())

    def results(self, x, y):
        """What + - * / make of two numbers, as strings in this order; '.' where that is not whole, too large or a
        product with 0 (which no division undoes), dropped at the end."""
        made = {operator: str(result) for _, operator, _, result in operations(x, y)
                if result <= self.largest and (operator != '*' or result)}
        return ' '.join(made.get(operator, '.') for operator in '+-*/').rstrip(' .').split()

    def grade(self, problem, response):
        try:
            value, used = evaluate(extract_answer(response) or '')
        except ValueError:
            return WRONG
        if value is None or sorted(used) != sorted(problem.numbers):
            return Grade(0.0, False, True)
        if value == problem.target:
            return Grade(1.0, True, True)
        closeness = 1 / (1 + abs(value - problem.target)) # in (0, 1)
        return Grade(self.partial_credit * float(closeness), False, True)


def evaluate(text):
    """
    The value of an arithmetic expression as an exact Fraction (None when it divides by zero), and the integers it uses.

    Integers are ASCII digits without leading zero; + - * / and parentheses, no signs, dots or underscores; white space
    only between tokens. Raises ValueError on anything else. Operators wait on a stack until what follows binds less
    tightly: no recursion, so no depth of parentheses can exhaust Python's.
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
            operators.pop() if token == ')' else operators.append(token)
            expects_number = token != ')'
        else:
            raise ValueError(f"{token!r} is not expected here")
    if operators:
        raise ValueError("a parenthesis is not closed")
    return values.pop(), used


def apply(x, operator, y):
    """x operator y, or None where a division by zero is in it."""
    if x is None or y is None or operator == '/' and y == 0:
        return None
    return x + y if operator == '+' else x - y if operator == '-' else x * y if operator == '*' else x / y


# --------------------------------------------------------------------------------------------------------------------
# Multiplication

class MultiplicationProblem(NamedTuple):
    a: int
    b: int


class Multiplication(Task):
    """What is a × b? Numbers are spelt in digits, so that the model has to carry."""

    def __init__(self, max_factor=99):
        self.max_factor = max_factor
        self.tokens = TAGS + ['What is ', ' × ', '?', '=', '+', '*', '\n'] + [str(n) for n in range(10)]

    def problem(self, rng):
        return MultiplicationProblem(*map(int, rng.integers(1, self.max_factor + 1, 2)))

    def prompt(self, problem):
        question = f'What is {problem.a} × {problem.b}?'
        return self.ask(question, question, 'the number', '1009') # a prime: no product

    def parse(self, text):
        """'47 * 36', '47 x 36' or 'What is 47 × 36?' -> problem. Raises ValueError."""
        match = typed(r'(?:What is )?([0-9]+) *[*x×] *([0-9]+)\??', text, '47 * 36')
        return MultiplicationProblem(int(match[1]), int(match[2]))

    def canonical(self, problem):
        return f'{min(problem)}*{max(problem)}'

    def difficulty(self, problem):
        return '{}x{} digits'.format(*sorted(len(str(n)) for n in problem))

    def remark(self, problem):
        usual = 1 <= min(problem) and max(problem) <= self.max_factor
        return '' if usual else f'outside its training: factors up to {self.max_factor}'

    def solution(self, problem):
        return problem.a * problem.b

    def explain(self, problem, answer):
        return f'the product is {self.solution(problem)}'

    def demonstration(self, problem, rng):
        """
        Of mixed quality, as texts by people are: a third give the answer at once, a third write the product with each
        digit of b and add these up, a third break it down to the products of single digits. All are right; but the less
        is written, the harder it is to say. Which way of thinking pays is for A*PO to find out.

        Numbers in the working stand with their units first, 74*03=0141, so that a carry is known before the digit that
        needs it (Lee et al., arXiv 2307.03381); written the usual way, nearly all of the last errors were carries.
        """
        back = lambda n: str(n)[::-1]
        digits = lambda n: [int(digit) * 10 ** place for place, digit in enumerate(reversed(str(n)))]
        detail = rng.integers(3)
        lines, total = [], 0
        for y in digits(problem.b) if detail else []:
            for x in digits(problem.a) if detail == 2 else [problem.a]:
                lines.append(f'{back(x)}*{back(y)}={back(x * y)}')
                if len(lines) > 1:
                    lines.append(f'{back(total)}+{back(x * y)}={back(total + x * y)}')
                total += x * y
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{self.solution(problem)}{END_ANSWER}'


# --------------------------------------------------------------------------------------------------------------------
# Three small ones, to start your own from

class Chain(Task):
    """What is 7+12-5? A problem is that text. Half of the demonstrations answer at once, half write each sum."""

    def __init__(self, max_number=20):
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
        return self.ask(problem, f'What is {problem}?', 'the number', '1009')

    def parse(self, text):
        text = re.sub(' *([+-]) *', r'\1', text.strip())
        if len(text) > 80 or not re.fullmatch(r'[0-9]+([+-][0-9]+)+', text) or self.solution(text) < 0:
            raise ValueError(f"{text[:80]!r} is no chain of numbers with a value of 0 or above; write it like '7+12-5'")
        return text

    def difficulty(self, problem):
        return f"{len(re.findall('[0-9]+', problem))} numbers"

    def demonstration(self, problem, rng):
        terms, lines = re.findall('[+-]?[0-9]+', problem), []
        for i in range(1, len(terms)) if rng.integers(2) else []:
            x = sum(map(int, terms[:i]))
            lines.append(f'{x}{terms[i]}={x + int(terms[i])}')
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{self.solution(problem)}{END_ANSWER}'


class Equation(Task):
    """
    Which whole number x makes a*x+b=c? A problem is that text. Half of the demonstrations answer at once, half write
    two steps: 22-7=15 and 15/3=5.
    """

    def __init__(self, max_number=20):
        self.max_number = max_number
        self.tokens = TAGS + list('*x+-/=\n') + [str(n) for n in range(9 * max_number + 100)]

    def problem(self, rng):
        a, b, x = (int(rng.integers(low, high + 1)) for low, high in ((2, 9), (1, 99), (1, self.max_number)))
        return f'{a}*x+{b}={a * x + b}'

    def solution(self, problem):
        a, b, c = map(int, re.findall('[0-9]+', problem))
        return (c - b) / a

    def prompt(self, problem):
        return self.ask(problem, f'Which whole number x solves {problem}?', 'the number', '1009')

    def parse(self, text):
        match = typed('([1-9][0-9]{0,4}) *[*]? *x *[+] *([0-9]{1,4}) *= *([0-9]{1,6})', text, '3*x+7=22')
        return '{}*x+{}={}'.format(*map(int, match.groups()))

    def difficulty(self, problem):
        return 'x up to 10' if self.solution(problem) <= 10 else 'x above 10'

    def demonstration(self, problem, rng):
        a, b, c = map(int, re.findall('[0-9]+', problem))
        x = (c - b) // a # a drawn problem has one
        lines = [f'{c}-{b}={c - b}', f'{c - b}/{a}={x}'] if rng.integers(2) else []
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{x}{END_ANSWER}'


class Grid(Task):
    """
    Walk from S to G on a 5 x 5 grid, not through #. A problem is its rows, joined by '/'. The demonstrations walk at
    random, never twice over one place (`U31` is a step up to row 3, column 1), start again on a new line when they are
    stuck, and then may give up. The answer is the steps: UURDR.
    """

    tokens = TAGS + list('.#SG/UDLR\n01234')

    def ways(self, grid, place):
        """The steps that can be taken from a place in the text, {letter: where it leads}; a row is six characters."""
        return {letter: place + step for letter, step in dict(U=-6, D=6, L=-1, R=1).items()
                if 0 <= place + step < len(grid) and grid[place + step] not in '#/'}

    def problem(self, rng):
        while True:
            cells = rng.choice(list('..#'), 25)
            cells[rng.choice(25, 2, replace=False)] = 'S', 'G'
            grid = '/'.join(map(''.join, cells.reshape(5, 5)))
            reached = {grid.index('S')}
            for _ in range(24):
                reached |= {to for place in reached for to in self.ways(grid, place).values()}
            if grid.index('G') in reached:
                return grid

    def prompt(self, problem):
        return self.ask(problem, f'Walk from S to G, not through #, on the grid {problem}, whose rows are separated '
                        'by /. U is up, D down, L left, R right.', 'the steps', 'UURDDL') # ends where it began

    def parse(self, text):
        one_of_each = '(?=[^S]*S[^S]*$)(?=[^G]*G[^G]*$)' # looks ahead, takes nothing
        return typed(f'{one_of_each}([.#SG]{{5}}/){{4}}[.#SG]{{5}}', text, 'S.#../.##../...../.#.#./....G')[0]

    def demonstration(self, problem, rng):
        lines, goal = [], problem.index('G')
        for _ in range(rng.integers(1, 4)):
            walk = {problem.index('S'): ''} # each place, and the step that led to it
            while (place := [*walk][-1]) != goal and (
                    ways := [(to, step) for step, to in self.ways(problem, place).items() if to not in walk]):
                walk.update([ways[rng.integers(len(ways))]])
            lines.append(''.join(f'{step}{to // 6}{to % 6}' for to, step in walk.items() if step))
            if goal in walk:
                break
        return '\n'.join(lines) + f"{END_THINK}{ANSWER}{''.join(walk.values())}{END_ANSWER}"

    def grade(self, problem, response):
        steps = re.fullmatch(f'{WHITE}([UDLR]+){WHITE}', extract_answer(response) or '')
        place = problem.index('S')
        for step in steps[1] if steps else '':
            place = self.ways(problem, place).get(step, -9) # from there no way leads on
        return Grade(float(place == problem.index('G')), place == problem.index('G'), steps is not None)


# --------------------------------------------------------------------------------------------------------------------
# The tasks of the reasoning-gym package

class ReasoningGym(Task):
    """
    A task of the reasoning-gym package by its name there, for pretrained models only: it has no demonstrations. A
    problem is an entry of the package, {'question', 'answer', 'metadata'}.

    Some of the package's scorers evaluate an answer as code, and some take for ever over a few characters (1e99999999
    as a fraction). So a scorer is watched: Python announces to an audit hook that it compiles or runs code, opens a
    file or starts a process, before it does, whoever asks for it, and the hook forbids all of that; a timer of one
    second of computing ends the rest. A task whose scorer must be stopped at its own answer or at nonsense is refused.
    """
    tokens = None # of no vocabulary of ours
    longest_prompt = 4096
    nonsense = '...', 'nan' # the example in the prompt, and what slips through comparisons
    scoring = stopped = False # for all objects, as there is one hook: a scorer is at work; it was stopped

    def __init__(self, name, partial_credit=0.0):
        from reasoning_gym.factory import DATASETS, create_dataset
        if name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0)[0]
            raise ValueError(f"the reasoning-gym package has no task {name!r}; did you mean reasoning_gym:{close}?")
        self.name, self.partial_credit = name, partial_credit
        self.dataset = functools.partial(create_dataset, name, size=1)
        self.scorer = self.dataset(seed=0)
        watch_scorers()

    def problem(self, rng):
        """One that can be solved here, and whose scorer tells its own answer from nonsense."""
        for _ in range(100):
            seed = int(rng.integers(2 ** 31))
            random.seed(seed) # some draw from this besides the seed that they are given
            entry = self.dataset(seed=seed)[0]
            ReasoningGym.stopped = False
            verdicts = [self.grade(entry, f'{END_THINK}{ANSWER}{answer}{END_ANSWER}').correct
                        for answer in (entry['answer'], *self.nonsense)]
            if ReasoningGym.stopped:
                raise ValueError(f"reasoning_gym:{self.name} is refused: its scorer runs text as code, or takes long")
            short = len(entry['question'].encode()) <= self.longest_prompt - 600 # there are no more tokens than bytes
            if short and verdicts == [True, False, False]:
                return entry
        raise ValueError(f"reasoning_gym:{self.name} is refused: its scorer does not tell its own answers from "
                         "nonsense, or these or the questions are too long")

    def prompt(self, problem):
        return self.ask('', problem['question'], 'the answer', '...')

    def parse(self, text):
        raise ValueError("the problems of reasoning-gym cannot be typed: sample.py without --prompt draws some")

    def canonical(self, problem):
        return problem['question']

    def grade(self, problem, response):
        """Right is what the package's scorer gives 1, and 0 where it raises or is stopped. What is between is paid by
        partial_credit only, for some scorers give a little to any text."""
        answer = (extract_answer(response) or '').strip()
        if not answer:
            return WRONG
        entry = copy.deepcopy(problem) # one scorer writes into it
        signal.setitimer(signal.ITIMER_VIRTUAL, 1, 1)
        try:
            ReasoningGym.scoring = True
            score = float(self.scorer.score_answer(answer, entry))
        except Exception: # whatever a text may make a scorer raise
            score = 0.0
        finally:
            ReasoningGym.scoring = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        near = self.partial_credit * score if 0 < score < 1 else 0.0 # some can err to above 1
        return Grade(1.0 if score == 1 else near, score == 1, True)


@functools.cache # once in a process: Python never lets go of an audit hook
def watch_scorers():
    def stop(*event): # of the hook, or the signal of the timer
        if ReasoningGym.scoring:
            ReasoningGym.stopped = True
            raise RuntimeError("this scorer is stopped")
    sys.addaudithook(stop)
    signal.signal(signal.SIGVTALRM, stop)


TASKS = dict(countdown=Countdown, multiplication=Multiplication, chain=Chain, equation=Equation, grid=Grid)


def find_task(name):
    """The class of a task. Raises ValueError when there is none of that name."""
    if name.startswith('reasoning_gym:'):
        return functools.partial(ReasoningGym, name.partition(':')[2])
    if name not in TASKS:
        raise ValueError(f"no such task; there are: {', '.join(TASKS)}, reasoning_gym:NAME")
    return TASKS[name]
