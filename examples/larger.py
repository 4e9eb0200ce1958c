"""
Countdown with 3, 4 and 5 numbers. No solution with 5 is ever demonstrated: those searches are given up, and the last
thing tried is worked out though it misses the target. What A*PO solves there nobody has shown it.

    python train.py --task=examples/larger.py
    python sample.py --task=examples/larger.py --eval --min_numbers=5
"""
import itertools

from tasks import ANSWER, END_ANSWER, END_THINK, Countdown, Term


class Larger(Countdown):
    defaults = dict(max_steps=240)

    def __init__(self,
                 min_numbers=3, # how many numbers at least
                 max_numbers=5, # how many at most
                 ):
        super().__init__(min_numbers=min_numbers, max_numbers=max_numbers)

    def demonstration(self, problem, rng):
        """Search as Countdown does; among five numbers in vain, for up to forty lines, the last of which
        becomes the answer. Two in three are given up within four lines."""
        if len(problem.numbers) < 5:
            return super().demonstration(problem, rng)
        lines, patience = [], rng.integers(1, 5) if rng.random() < 2 / 3 else rng.integers(5, 41)
        for _ in range(1000): # every join of 1 1 1 1 1=1 leaves a solution
            joined, three = self.join(problem, rng)
            search = list(self.search(problem, three, joined)) # lines that join, and one for each of the three
            if any(solution for _, solution in search):
                continue
            pool, tried = three, min(patience, 3)
            lines += [line for line, _ in search[:len(joined) + tried]]
            patience -= tried
            if not patience:
                break
        if not lines:
            return self.response(problem, []) # the sum of the numbers
        # Some result of the last line's x and y, and some result of that and of z.
        z = pool[tried - 1]
        x, y = [term for term in pool if term is not z]
        left, _, right = lines[-1].rpartition(':')
        made = right.split()[2:]
        ends = [(middle, end) for middle in self.joins(x, y) for end in self.joins(z, middle)
                if str(middle.value) in made and end.value != problem.target]
        middle, end = ends[rng.integers(len(ends))]
        made = made[:made.index(str(middle.value)) + 1]
        lines[-1] = f"{left}:{x.value} {y.value} {' '.join(made)}:{' '.join(end.steps)}"
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{end.text[1:-1]}{END_ANSWER}'

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
