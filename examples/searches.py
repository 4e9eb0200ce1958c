"""
Countdown with 4 numbers in at most 200 tokens, which is too little to try everything. The demonstrations search in one
of four ways, and the first line of a response says which. None gives up and none is guided, so imitation learns all
four and chooses among them at random. Which one fits a puzzle is left for A*PO to find out.

    python train.py --task=examples/searches.py
    python train.py --task=examples/searches.py --longest=200 --max_steps=0 --out_dir=out/successful   # to compare
"""
from tasks import Countdown, Tokenizer

ORDERS = { # by the first line of a response: what the joins are sorted by
    '+': lambda term: '+' not in term.steps[-1], # sums before all other joins
    '*': lambda term: '*' not in term.steps[-1],
    '/': lambda term: '/' not in term.steps[-1],
    '.': lambda term: term.value} # small results first


class Searches(Countdown):
    defaults = dict(warmup_steps=4000, max_new_tokens=200, max_steps=64)

    def __init__(self,
                 longest=0, # demonstrate a search of fewer tokens where there is one: imitation with a verifier; 0: any
                 ):
        super().__init__(min_numbers=4)
        self.longest = longest

    def demonstration(self, problem, rng):
        """Write one of the four searches to its end, which is the answer."""
        for name in rng.permutation(list(ORDERS)):
            text = f'{name}\n' + self.response(problem, self.search(problem, order=ORDERS[name]))
            if not self.longest or len(Tokenizer(self.tokens).encode(text)) < self.longest:
                break
        return text
