"""
A task: which whole number x makes 3*x+7=22? `python train.py --task=examples/equation.py` trains it.

Its answer is a whole number, so it has a `solution`, and the class Task grades it.
"""
import re

from tasks import ANSWER, END_ANSWER, END_THINK, TAGS, THINK, Task, match_typed


class Equation(Task):
    """Solve a*x+b=c. A problem is that text. Half of the demonstrations answer at once, half write 22-7=15 15/3=5."""
    defaults = dict(warmup_steps=1500, warmup_batch_size=32, max_steps=60, max_new_tokens=64)

    def __init__(self,
                 max_number=20, # x is drawn from 1 to this
                 ):
        if max_number < 1:
            raise ValueError(f"{max_number=} must be at least 1")
        self.max_number = max_number
        self.tokens = TAGS + list('*x+-/=\n') + [str(n) for n in range(9 * max_number + 100)] # up to the largest c

    def problem(self, rng):
        a, b, x = (int(rng.integers(low, high + 1)) for low, high in ((2, 9), (1, 99), (1, self.max_number)))
        return f'{a}*x+{b}={a * x + b}'

    def solution(self, problem):
        a, b, c = map(int, re.findall('[0-9]+', problem))
        return (c - b) / a # not whole for some that are typed, and then no answer is right

    def prompt(self, problem):
        return problem + THINK

    def question(self, problem):
        return f'Which whole number x solves {problem}?'

    def parse(self, text):
        """Read '3*x+7=22' or '3x + 7 = 22'. Raises ValueError."""
        match = match_typed('([1-9][0-9]{0,4}) *[*]? *x *[+] *([0-9]{1,4}) *= *([0-9]{1,6})', text, '3*x+7=22')
        return '{}*x+{}={}'.format(*map(int, match.groups()))

    def difficulty(self, problem):
        return 'x up to 10' if self.solution(problem) <= 10 else 'x above 10'

    def demonstration(self, problem, rng):
        a, b, c = map(int, re.findall('[0-9]+', problem))
        x = (c - b) // a # exact in every problem that is drawn
        lines = [f'{c}-{b}={c - b}', f'{c - b}/{a}={x}'] if rng.integers(2) else []
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{x}{END_ANSWER}'
