"""
Countdown with 3, 4 and 5 numbers. A model from random weights never sees a solution with 5: those searches are given
up. What A*PO solves there nobody has shown it.

    python train.py --task=examples/larger.py
    python sample.py --task=examples/larger.py --eval --min_numbers=5
"""
import itertools

from tasks import ANSWER, END_ANSWER, END_THINK, Countdown, Term


class Larger(Countdown):
    # Within 800 tokens a third of the responses to five numbers would not end.
    defaults = dict(warmup_steps=8000, max_steps=64, max_new_tokens=1200)

    def __init__(self,
                 min_numbers=3, # how many numbers at least
                 max_numbers=5, # how many at most
                 ):
        super().__init__(min_numbers=min_numbers, max_numbers=max_numbers)

    def demonstration(self, problem, rng):
        """Search as Countdown does; among five numbers in vain, for up to sixty lines."""
        if len(problem.numbers) > 4:
            return self.give_up(problem, self.search_in_vain(problem, rng))
        response = super().demonstration(problem, rng)
        if self.grade(problem, response).correct:
            return response
        return self.give_up(problem, response.partition(END_THINK)[0].split('\n'))

    def give_up(self, problem, lines):
        """Write these lines, and as the answer what the last one makes that is nearest to the target,
        worked out. All sizes end so: if only five numbers did, the model would learn that with five
        numbers it must miss."""
        if not lines:
            return self.response(problem, []) # the sum of the numbers
        left, right = lines[-1].split(':') # z and what is wanted, x, y and what they make
        x, y, *made = right.split()
        pool = self.left_over(problem, lines)
        z = next(term for term in pool if str(term.value) == left.split()[0])
        others = [term for term in pool if term is not z]
        ends = [(middle, end) for middle in self.joins(*others) if str(middle.value) in made
                for end in self.joins(z, middle)]
        middle, end = min(ends, key=lambda pair: abs(pair[1].value - problem.target))
        made = made[:made.index(str(middle.value)) + 1]
        lines[-1] = f"{left}:{x} {y} {' '.join(made)}:{' '.join(end.steps)}"
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{end.text[1:-1]}{END_ANSWER}'

    def left_over(self, problem, lines):
        """Return the three terms that the last of these lines is about: what its joins have left."""
        pool = [Term(n, str(n), ()) for n in problem.numbers]
        joined = [line for line in lines if ':' not in line]
        for line in joined[3 - len(pool):]: # one with four numbers, two with five
            pair, step = line.split()[0].split(')')
            x, y = list(itertools.combinations(pool, 2))[int(pair) - 1]
            term = next(term for term in self.joins(x, y) if term.steps[-1] == step)
            pool = [term, *(other for other in pool if other is not x and other is not y)]
        return pool

    def search_in_vain(self, problem, rng):
        """Return the lines of a search among five numbers that joins at random and finds nothing: one to four
        lines of three numbers in two demonstrations of three, five to sixty in the third."""
        lines, patience = [], rng.integers(1, 5) if rng.random() < 2 / 3 else rng.integers(5, 61)
        for _ in range(1000): # every join of 1 1 1 1 1=1 leaves a solution
            joined, three = self.join(problem, rng)
            search = list(self.search(problem, three, joined)) # lines that join, and one for each of the three
            if any(solution for _, solution in search):
                continue
            tried = min(patience, 3)
            lines += [line for line, _ in search[:len(joined) + tried]]
            patience -= tried
            if not patience:
                break
        return lines

    def join(self, problem, rng):
        """Join two numbers at random until three are left. Returns the lines that say so, and what
        is left."""
        lines, pool = [], [Term(n, str(n), ()) for n in problem.numbers]
        while len(pool) > 3:
            pairs = list(enumerate(itertools.combinations(pool, 2), start=1))
            i, (x, y) = pairs[rng.integers(len(pairs))]
            terms = self.joins(x, y)
            term = terms[rng.integers(len(terms))]
            rest = [other for other in pool if other is not x and other is not y]
            lines.append(f"{i}){term.steps[-1]} {' '.join(str(other.value) for other in rest)}")
            pool = [term, *rest]
        return lines, pool
