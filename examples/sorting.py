"""
A task to start your own from: sort numbers. `python train.py --task=examples/sorting.py` trains it.

Copy this file, change it, and name the copy by --task. A task needs all that is here except defaults, question,
canonical (for problems that are texts) and difficulty.
"""
import re

from tasks import ANSWER, END_ANSWER, END_THINK, TAGS, THINK, WRONG, Grade, Task, extract_answer, match_typed


class Sorting(Task):
    """Sort numbers. A problem is a tuple of them; it could be anything that the methods below understand."""
    # What train.py uses where the command line says nothing else; what is not here has the same default in all tasks.
    # max_new_tokens has to be enough for the longest demonstration: the start says how many are cut off.
    defaults = dict(warmup_steps=600, warmup_batch_size=32, max_steps=60, max_new_tokens=64)

    # Each argument is a setting of train.py, such as --max_number=20 here. `train.py --help` prints its default and its
    # comment, so each argument has both, on a line of its own.
    def __init__(self,
                 max_number=20, # numbers are drawn from 1 to this
                 ):
        if max_number < 10: # see below
            raise ValueError(f"{max_number=} must be at least 10") # train.py prints this in one line and ends
        self.max_number = max_number
        # The vocabulary has every piece of prompts and demonstrations. Where '10' is in it, each number is one token
        # and the space between two numbers (or dots) goes without saying. Otherwise numbers are spelt in digits, and
        # ' ' is needed.
        self.tokens = TAGS + list('=:\n') + [str(n) for n in range(max_number + 1)]

    def problem(self, rng):
        """Draw a problem by a numpy Generator, and by nothing else, so that a run can be repeated."""
        return tuple(map(int, rng.integers(1, self.max_number + 1, rng.integers(3, 7))))

    def prompt(self, problem):
        return ' '.join(map(str, problem)) + '=' + THINK

    def question(self, problem):
        """Ask the same in words. Only pretrained weights (--init_from) are asked so."""
        numbers = ' '.join(map(str, problem))
        return f'Sort the numbers {numbers}, the smallest first.'

    def parse(self, text):
        """Read what a person types to sample.py. Raises ValueError on all that `grade` could not handle."""
        return tuple(map(int, match_typed('[0-9]+( +[0-9]+)+', text, '7 3 12')[0].split()))

    def canonical(self, problem):
        """Return a text that is equal for problems that come to the same. About a tenth of these texts is held out."""
        return ' '.join(map(str, sorted(problem)))

    def difficulty(self, problem):
        return f'{len(problem)} numbers' # accuracy is reported for each such group

    def demonstration(self, problem, rng):
        """
        Write what the warm-up imitates. Half of the demonstrations answer at once, half take out the smallest number
        again and again: '3:7 12' says that 3 is taken out and that 7 and 12 are left. Which of the two pays is left for
        A*PO to find out.
        """
        lines, left = [], list(problem)
        for smallest in sorted(problem) if rng.integers(2) else []:
            left.remove(smallest)
            lines.append(f"{smallest}:{' '.join(map(str, left))}")
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{self.canonical(problem)}{END_ANSWER}'

    def grade(self, problem, response):
        """Return the reward, whether the answer is right, and whether it has the format. Where an answer is one whole
        number, `solution(problem)` can stand here instead: see examples/equation.py."""
        answer = extract_answer(response)
        if answer is None or not re.fullmatch('[0-9 ]+', answer):
            return WRONG
        correct = answer.split() == self.canonical(problem).split()
        return Grade(float(correct), correct, True)
