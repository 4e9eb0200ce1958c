"""
Countdown with 4 numbers in at most 200 tokens, which is too little to try everything. The demonstrations search in one
of four ways, and the first line of a response says which: the operator that joins two of the numbers first. None gives
up and none is guided, so imitation learns all four and chooses among them at random. Which one fits a puzzle is left
for A*PO to find out.

    python train.py --task=examples/searches.py
    python train.py --task=examples/searches.py --longest=200 --max_steps=0 --out_dir=out/successful   # to compare
"""
import itertools

from tasks import ANSWER, END_ANSWER, END_THINK, Countdown, Term, Tokenizer


class Searches(Countdown):
    defaults = dict(warmup_steps=4000, max_new_tokens=200, max_steps=192)

    def __init__(self,
                 longest=0, # demonstrate a search of fewer tokens where there is one: imitation with a verifier; 0: any
                 ):
        super().__init__(min_numbers=4)
        self.longest = longest

    def demonstration(self, problem, rng):
        """Write the search by one of the four operators, to its end, which is the answer."""
        for first in rng.permutation(list('+-*/')):
            text = self.response(problem, first)
            if not self.longest or len(Tokenizer(self.tokens).encode(text)) < self.longest:
                break
        return text

    def response(self, problem, first):
        """Write the search that joins by the operator `first` before all others. When it finds nothing, the answer is
        the sum of the numbers."""
        lines, answer = [str(first)], '+'.join(map(str, problem.numbers))
        for line, solution in self.search_by(problem, first):
            lines.append(line)
            if solution:
                lines[-1] += ':' + ' '.join(solution.steps)
                answer = solution.text[1:-1]
                break
        return '\n'.join(lines) + f'{END_THINK}{ANSWER}{answer}{END_ANSWER}'

    def search_by(self, problem, first):
        """Search as Countdown does, line by line, but through the pairs once with the operator `first`, and then again
        with the others."""
        terms = [Term(n, str(n), ()) for n in problem.numbers]
        joins = [(i, x, y, term) for i, (x, y) in enumerate(itertools.combinations(terms, 2), start=1)
                 for term in self.joins(x, y)]
        joins.sort(key=lambda join: first not in join[3].steps[0]) # a stable sort
        for i, x, y, term in joins:
            rest = [other for other in terms if other is not x and other is not y]
            line = f"{i}){term.steps[0]} {' '.join(str(other.value) for other in rest)}"
            yield from self.search(problem, [term, *rest], [line])
