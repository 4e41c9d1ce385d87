"""How many processes a job has, and where. Free of torch and of TorchX."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How many nodes, and how many processes on each."""

    nodes: int
    processes: int

    @classmethod
    def parse(cls, j: str) -> "Layout":
        """Read NODESxPROCESSES, or PROCESSES of one node.

        Raises:
            ValueError: if it is neither, or one of them is 0.
        """
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)", j)
        layout = cls(int(match[1] or 1), int(match[2])) if match else cls(0, 0)
        if layout.size == 0:
            raise ValueError(
                f"-j: expected NODESxPROCESSES, as in 2x4 for 2 nodes with 4 processes each, "
                f"found {j!r}. The number of nodes is fixed: to change it, start the job anew with "
                "resume=true."
            )
        return layout

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.nodes * self.processes
