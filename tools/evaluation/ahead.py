"""What is looked at before the first image is scored, so that a set that does not fit does not stop hours of work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tools.evaluation.classes import outputs_of
from tools.evaluation.models import Classifier
from tools.evaluation.sets import Source


def check_sources(sources: Iterable[Source], classifiers: Sequence[Classifier], images: int | None) -> None:
    """Look at path, classes and number of images of every set.

    Args:
        sources: the sets.
        classifiers: the models that will be shown them.
        images: how many images of each set are asked for; None for all.

    Raises:
        FileNotFoundError, ValueError: no images there, other classes than a model's, or too few images.
    """
    for source in sources:
        outline = source.look()
        for classifier in classifiers if source.labelled else ():
            outputs_of(
                outline.classes,
                classifier.classes,
                str(source.path),
                f"the model {classifier.name}",
                fewer=source.fewer != "refuse",
            )
        if images is not None and images > outline.images:
            raise ValueError(f"--images asks for {images}, but {source.path} has {outline.images}")
