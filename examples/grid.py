"""
A task: walk from S to G on a 5 x 5 grid, around the walls. `python train.py --task=examples/grid.py` trains it.

It is one where the answer is not a number and many answers are right, so it has a `grade` of its own.
"""
import re

from tasks import ANSWER, END_ANSWER, END_THINK, TAGS, THINK, WHITE, Grade, Task, extract_answer, match_typed


class Grid(Task):
    """Walk from S to G, not through #. A problem is the rows of the grid, joined by '/'; an answer is steps: UURDR."""
    defaults = dict(warmup_steps=2000, warmup_batch_size=32, max_steps=120, max_new_tokens=192)
    tokens = TAGS + list('.#SG/UDLR\n01234')

    def ways(self, grid, place):
        """Return the steps that can be taken from a place in the text, {letter: the place it leads to}."""
        return {letter: place + step for letter, step in dict(U=-6, D=6, L=-1, R=1).items() # a row has 5 cells and '/'
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
        return problem + THINK

    def question(self, problem):
        return (f'By which steps, of U for up, D for down, L for left and R for right, do I walk from S to G, not '
                f'through #, on the grid {problem}, whose rows are separated by /?')

    def parse(self, text):
        one_of_each = '(?=[^S]*S[^S]*$)(?=[^G]*G[^G]*$)' # looks ahead, takes nothing
        return match_typed(f'{one_of_each}([.#SG]{{5}}/){{4}}[.#SG]{{5}}', text, 'S.#../.##../...../.#.#./....G')[0]

    def demonstration(self, problem, rng):
        """
        Walk at random, never over one place twice, a line for each walk: `U31` is a step up to row 3, column 1. A walk
        that is stuck is followed by another from the start, up to three in all. The last one is the answer, whether it
        has reached G or not. That it pays to start again more often is left for A*PO to find out.
        """
        lines, goal = [], problem.index('G')
        for _ in range(rng.integers(1, 4)):
            place = problem.index('S')
            walk = {place: ''} # each place, and the step that led to it
            while place != goal:
                ways = [(to, step) for step, to in self.ways(problem, place).items() if to not in walk]
                if not ways:
                    break
                place, step = ways[rng.integers(len(ways))]
                walk[place] = step
            lines.append(''.join(f'{step}{to // 6}{to % 6}' for to, step in walk.items() if step))
            if place == goal:
                break
        return '\n'.join(lines) + f"{END_THINK}{ANSWER}{''.join(walk.values())}{END_ANSWER}"

    def grade(self, problem, response):
        steps = re.fullmatch(f'{WHITE}([UDLR]+){WHITE}', extract_answer(response) or '')
        place = problem.index('S')
        for step in steps[1] if steps else '':
            place = self.ways(problem, place).get(step)
            if place is None: # into a wall, or off the grid
                break
        correct = place == problem.index('G')
        return Grade(float(correct), correct, steps is not None)
