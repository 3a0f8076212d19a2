"""Images and labels of a BIDS tree, by subject and session."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from riskmap_ext.finetune.base.errors import ConfigError, Problems
from riskmap_ext.finetune.base.files import is_image, stem
from riskmap_ext.finetune.base.log import some

# Case, and what follows it in a file's name: the kind of image or label.
_NAME = re.compile(r"(sub-[^_]+(?:_ses-[^_]+)?)(_.+)")
_LABEL = re.compile(r"_label-|_(dseg|mask|seg)(-|$)")
# Case, kind and path of each.
Files = list[tuple[str, str, Path]]


def bids_pairs(
    root: Path, image_suffix: Sequence[str], label_suffix: str
) -> tuple[list[dict[str, Path]], dict[str, Path], list[str]]:
    """Case -> image of each channel, case -> label, and the suffixes of the channels.

    A case is a subject, or a session of one. Suffixes are how file names must end; if omitted, all
    files must be of one kind.

    Raises: ConfigError naming the kinds to choose from, DataError for several files of one case.
    """
    images, labels = bids_files(root, label_suffix)
    found = [_chosen(root, images, suffix, "data.image_suffix") for suffix in image_suffix]
    by_label, _ = _chosen(root, labels, label_suffix, "data.label_suffix")
    return [files for files, _ in found], by_label, [suffix for _, suffix in found]


def bids_files(root: Path, label_suffix: str = "") -> tuple[Files, Files]:
    """Images of the tree itself; labels of it and of derivatives/, at any depth."""
    images: Files = []
    labels: Files = []
    for pattern in ("sub-*/anat/*", "sub-*/ses-*/anat/*", "derivatives/**/anat/*"):
        for path in sorted(filter(is_image, root.glob(pattern))):
            if name := _NAME.fullmatch(stem(path)):
                case, kind = name.groups()
                if kind.endswith(label_suffix) if label_suffix else _LABEL.search(kind):
                    labels.append((case, kind, path))
                elif not pattern.startswith("derivatives"):
                    images.append((case, kind, path))
    return images, labels


def _chosen(root: Path, files: Files, suffix: str, key: str) -> tuple[dict[str, Path], str]:
    """The files whose names end in `suffix`, by case, and the suffix."""
    counts = Counter(kind for _, kind, _ in files)
    fitting = [each for each in files if each[1].endswith(suffix)]
    if not fitting or (not suffix and len(counts) > 1):
        told = some([f"{kind} ({count})" for kind, count in counts.most_common()], 10)
        expected = f"names that end in {suffix!r}" if suffix else "files of one kind"
        raise ConfigError(f"{key}: expected {expected} in {root}, found {told or 'none'}")
    chosen: dict[str, Path] = {}
    problems = Problems()
    for case, _, path in fitting:
        if case in chosen:
            problems.append(
                f"{path}: {case} has {chosen[case].name} as well; a longer {key} chooses"
            )
        chosen[case] = path
    problems.tell()
    return chosen, suffix or next(iter(counts))
