"""What a checkpoint holds, in words: `gr checkpoint inspect`."""

import json
from pathlib import Path

from gr.checkpoint import complete_steps, read_record


def inspect(path: str | Path) -> str:
    """Return in words what a checkpoint holds: step, tensors with shape and bytes, plain values.

    Args:
        path: a step_N folder, a checkpoints folder or a run directory (then the newest is taken).

    Raises:
        ValueError: if there is no complete checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"{path}: expected a folder, found {'a file' if folder.exists() else 'none'}"
        )
    for candidate in (folder, folder / "checkpoints"):
        steps = complete_steps(candidate)
        if steps:
            folder = candidate / f"step_{steps[-1]}"
    record = read_record(folder)
    tensors = record["tensors"]
    total = sum(each["bytes"] for each in tensors.values())
    lines = [
        f"{folder}",
        f"step {record['step']}, saved by {record['ranks']} rank(s), fingerprint "
        f"{record['fingerprint']}, {len(tensors)} tensors, {total:,} bytes",
    ]
    for group in dict.fromkeys(key.split(".", 1)[0] for key in tensors):
        members = {k: t for k, t in tensors.items() if k.split(".", 1)[0] == group}
        lines.append(f"{group}: {sum(t['bytes'] for t in members.values()):,} bytes")
        width = max(len(key) for key in members)
        for key, each in members.items():
            shape = " x ".join(map(str, each["shape"])) or "scalar"
            lines.append(f"  {key:{width}}  {shape:>16}  {each['dtype']:8} {each['bytes']:,} bytes")
    if record["values"]:
        lines.append("values:")
    for key, value in record["values"].items():
        text = json.dumps(value)
        lines.append(f"  {key} = {text if len(text) <= 200 else text[:200] + ' ...'}")
    return "\n".join(lines)
