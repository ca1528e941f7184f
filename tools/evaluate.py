"""Evaluates models on clean, corrupted and other images: tables, JSON and CSV.

python tools/evaluate.py --checkpoint runs/x --data SHARDS
"""

from __future__ import annotations

import logging
import sys

import tyro
from pydantic import ValidationError

from tools.evaluation.command import EvaluateCommand
from tools.evaluation.run import evaluate
from tools.runtime.config import explain
from tools.runtime.launcher import end_with_launcher

__all__ = ["EvaluateCommand", "evaluate"]


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    end_with_launcher()
    try:
        evaluate(tyro.cli(EvaluateCommand, description=EvaluateCommand.__doc__))
    except ValidationError as error:
        sys.exit(explain(error, EvaluateCommand, "evaluate.py"))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")


if __name__ == "__main__":
    main()
