"""Which ids have which rows, one id at a time in Python: what IdMap must equal."""

MASK = 2**64 - 1


def python_hash(x: int) -> int:
    """SplitMix64 on Python integers, top bit dropped."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) & (2**63 - 1)


class IdOracle:
    def __init__(self, num_rows, admit_after=1, max_waiting=0, ttl=0, evicts=True):
        self.num_rows, self.admit_after, self.ttl, self.evicts = num_rows, admit_after, ttl, evicts
        self.max_waiting = (max_waiting or num_rows) if admit_after > 1 else 0
        self.row: dict[int, int] = {}
        self.step: dict[int, int] = {}
        self.time: dict[int, int] = {}
        self.waiting: dict[int, list[int]] = {}
        self.now = self.swept = 0
        self.admitted = self.evicted = self.expired = self.refused = self.forgotten = 0

    def observe(self, looked_up: list[int], events: list[int], step: int, time: int):
        """Return the ids that got a row, and the rows that were freed, in the order of freeing."""
        self.now = max(self.now, time)
        had = set(self.row)
        for x in looked_up:
            if x in self.row:
                self.step[x], self.time[x] = step, self.now
        freed = []
        if self.ttl and self.now - self.swept >= self.ttl // 64:
            self.swept = self.now
            old = [x for x in self.row if self.time[x] < self.now - self.ttl]
            self.expired += len(old)
            freed += self._free(old)
        for x in events:
            if x != -1 and x not in had:
                entry = self.waiting.setdefault(x, [0, 0])
                entry[0], entry[1] = entry[0] + 1, step
        due = [x for x, (count, _) in self.waiting.items() if count >= self.admit_after]
        lacking = len(due) - (self.num_rows - 1 - len(self.row))
        if lacking > 0 and self.evicts:
            order = sorted(self.row, key=lambda x: (self.step[x], python_hash(x) >> 31, x))
            num = max(lacking, self.num_rows // 64)
            old = [x for x in order if self.step[x] < step][:num]
            self.evicted += len(old)
            freed += self._free(old)
        free = [r for r in range(1, self.num_rows) if r not in set(self.row.values())]
        due.sort(key=lambda x: (-self.waiting[x][0], python_hash(x)))
        self.refused += max(0, len(due) - len(free))
        admitted = sorted(due[: len(free)])
        for x, row in zip(admitted, free, strict=False):
            self.row[x], self.step[x], self.time[x] = row, step, self.now
            del self.waiting[x]
        self.admitted += len(admitted)
        excess = len(self.waiting) - self.max_waiting
        if excess > 0:
            num = max(excess, self.max_waiting // 8)
            oldest = sorted(
                self.waiting, key=lambda x: (self.waiting[x][1], python_hash(x) >> 31, x)
            )
            for x in oldest[:num]:
                del self.waiting[x]
            # Without admit_after nothing waits: what was refused is not kept, nor counted again.
            self.forgotten += num if self.admit_after > 1 else 0
        return admitted, freed

    def _free(self, ids: list[int]) -> list[int]:
        return [self.row.pop(x) for x in ids]
