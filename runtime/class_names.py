"""Class labels by name: those of the data a model was trained on, or ImageNet's."""

import difflib
import re
from functools import cache

from runtime.cli import UserError


def resolve_labels(words, num_classes, classes=None):
    """Labels, as numbers, of words: each a label itself, or a class's name, whatever its case.

    num_classes   of the model, 0 for an unconditional one
    classes       the names of its classes, in order; where there are 1000 and they are not known, or
                  are WordNet's ids of ImageNet, ImageNet's names count
    Raises UserError for a word that is neither, with the nearest names.
    """
    named = _imagenet_labels() if num_classes == 1000 and _are_imagenets(classes) else {}
    for label, name in enumerate(classes or ()):
        for called in (name, *name.split(", ")):  # a diffusers folder has synonyms after commas
            labels = named.setdefault(called.lower(), [])
            if label not in labels:
                labels.append(label)
    return [_resolve(str(word), num_classes, named) for word in words]


def _resolve(word, num_classes, named):
    if not num_classes:
        raise UserError(f"--class-labels {word}: this model is unconditional; leave it out")
    if re.fullmatch(r"[+-]?\d+", word):
        if not 0 <= int(word) < num_classes:
            raise UserError(f"--class-labels {word}: must be between 0 and {num_classes - 1}, or a name")
        return int(word)
    found = named.get(word.lower(), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"--class-labels {word!r}: {len(found)} classes are called that; give one of"
            f" {', '.join(map(str, found))}"
        )
    near = difflib.get_close_matches(word.lower(), named, n=3, cutoff=0.5)
    hint = " or ".join(f'"{name}"' for name in near) or f"a label of 0 to {num_classes - 1}"
    raise UserError(f"--class-labels {word!r}: no such class; did you mean {hint}?")


def class_names(num_classes, classes=None):
    """A name for every label, in order: the given ones, ImageNet's (synonyms after commas), or the number."""
    if classes and len(classes) == num_classes:
        names = list(classes)
        if num_classes != 1000 or not _are_imagenets(names):
            return names
    if num_classes == 1000:
        return [_imagenet().index_to_description(label) for label in range(1000)]
    return [str(label) for label in range(num_classes)]


def _are_imagenets(classes):
    return not classes or list(classes) == [_imagenet().index_to_label_name(i) for i in range(1000)]


@cache
def _imagenet():
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k")


def _imagenet_labels():
    """Every name, in lower case, and every WordNet id, of ImageNet's classes: a dict to lists of labels."""
    labels = {}
    for label in range(1000):
        names = _imagenet().index_to_description(label).split(", ")
        for name in [*names, _imagenet().index_to_label_name(label)]:
            entry = labels.setdefault(name.lower(), [])
            if label not in entry:
                entry.append(label)
    return labels
