"""Where a model's files are; looking for them needs neither torch nor transformers."""

from pathlib import Path


def find_model(folder: Path) -> Path:
    """The folder with config.json: the one given, or the snapshot in a hub's cache of it; else a ValueError."""
    if (folder / "config.json").is_file():
        return folder
    main, snapshots = folder / "refs" / "main", folder / "snapshots"
    if main.is_file() and (snapshots / main.read_text(encoding="utf-8").strip() / "config.json").is_file():
        return snapshots / main.read_text(encoding="utf-8").strip()
    found = sorted(path.parent for path in snapshots.glob("*/config.json")) if snapshots.is_dir() else []
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} snapshots and none is main; name one of them, as {found[0]}")
    if not found:
        reason = "expected a folder with config.json"
        if not folder.exists():
            reason = "there is no such folder, and nothing is downloaded"
        elif (folder / "adapter_config.json").is_file():
            reason = "an adapter alone; expected the model that it is merged into (merge_and_unload)"
        raise ValueError(f"{folder} holds no model: {reason}")
    return found[0]
